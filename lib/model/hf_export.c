/* A checkpoint's weights as a Hugging Face folder, tensor by tensor. */
#include "base/err.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/sys.h"
#include "ckpt/ckpt.h"
#include "model/hf.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KIND "model"
enum { CHUNK_BYTES = 32 << 20 };

struct export
{
	struct ckpt *ckpt;
	const char *dir;
	struct arena arena;
	struct model_config model;
	enum hf_family family;
	struct hf_plan plan;
	struct st_tensor *tensors; /* one for the parts that share it */
	size_t n_tensors;
	struct st_writer *writer;
	char *box, *turned; /* CHUNK_BYTES each */
	struct err *e;
};

/* What it was converted from, where that still fits; else the first family that does. */
static int choose_family(struct export *x)
{
	const char *was = json_get_string(json_get(ckpt_meta(x->ckpt), "hf"), "model_type", "");
	static const enum hf_family order[HF_FAMILY_COUNT] = {HF_LLAMA,     HF_QWEN2,       HF_QWEN3,
	                                                      HF_MISTRAL,   HF_MIXTRAL,     HF_QWEN3_MOE,
	                                                      HF_QWEN2_MOE, HF_DEEPSEEK_V3, HF_GPT2};
	const char *why = "";
	for (int f = 0; f < HF_FAMILY_COUNT; f++)
		if (!strcmp(was, hf_family_name((enum hf_family)f)) &&
		    hf_family_fits((enum hf_family)f, &x->model, &why)) {
			x->family = (enum hf_family)f;
			return 0;
		}
	for (int i = 0; i < HF_FAMILY_COUNT; i++)
		if (hf_family_fits(order[i], &x->model, &why)) {
			x->family = order[i];
			return 0;
		}
	const struct model_config *m = &x->model;
	enum hf_family nearest = m->multi_latent_attention           ? HF_DEEPSEEK_V3
	                         : m->num_experts != OPTION_NULL_INT ? HF_MIXTRAL
	                         : m->position_embedding_type == MODEL_POSITION_LEARNED_ABSOLUTE ? HF_GPT2
	                                                                                         : HF_LLAMA;
	hf_family_fits(nearest, m, &why);
	return err_set(x->e, EXIT_BAD_DATA,
	               "%s: no Hugging Face model is built like this one; the nearest, %s, needs %s",
	               ckpt_path(x->ckpt), hf_family_name(nearest), why);
}

static int check_part(struct export *x, const struct hf_part *p, enum dtype *dtype)
{
	const struct ckpt_entry *t = ckpt_find(x->ckpt, KIND, p->name);
	if (!t)
		return err_set(x->e, EXIT_BAD_DATA, "%s: tensor %s (" KIND ") is missing", ckpt_path(x->ckpt),
		               p->name);
	bool same = t->nd == p->nd && t->shape[0] == p->shape[0] && (p->nd < 2 || t->shape[1] == p->shape[1]);
	if (!same || (t->dtype != DT_f32 && !dtype_is_half(t->dtype)))
		return err_set(x->e, EXIT_BAD_DATA,
		               "%s: tensor %s is %s [%lld, %lld]; expected f32, bf16 or f16 [%lld, %lld]",
		               ckpt_path(x->ckpt), p->name, dtype_rows[t->dtype].name, (long long)t->shape[0],
		               (long long)(t->nd > 1 ? t->shape[1] : 1), (long long)p->shape[0],
		               (long long)p->shape[1]);
	*dtype = t->dtype;
	return 0;
}

static const enum st_dtype file_dtypes[DT_COUNT] = {
        [DT_f32] = ST_F32, [DT_bf16] = ST_BF16, [DT_f16] = ST_F16};

/* One HF tensor for each run of parts with the same name. */
static int plan_tensors(struct export *x)
{
	x->tensors = mem_array(x->plan.n, sizeof *x->tensors);
	for (size_t i = 0; i < x->plan.n; i++) {
		const struct hf_part *p = &x->plan.parts[i];
		enum dtype dtype = DT_f32;
		if (check_part(x, p, &dtype))
			return x->e->code;
		enum st_dtype st = file_dtypes[dtype];
		struct st_tensor *t =
		        p->first_row ? &x->tensors[x->n_tensors - 1] : &x->tensors[x->n_tensors++];
		if (p->first_row && t->dtype != st)
			return err_set(x->e, EXIT_BAD_DATA, "%s: the parts of %s differ in type",
			               ckpt_path(x->ckpt), p->hf_name);
		*t = (struct st_tensor){.name = p->hf_name,
		                        .dtype = st,
		                        .nd = p->nd,
		                        .shape = {p->hf_shape[0], p->hf_shape[1]}};
	}
	return 0;
}

/* Rows [row, row + rows) and columns [column, column + columns) of a part into x->box. */
static int read_box(struct export *x, const struct hf_part *p, int64_t row, int64_t rows, int64_t column,
                    int64_t columns, enum dtype dtype)
{
	const int64_t offset[2] = {row, column}, extent[2] = {rows, columns};
	return ckpt_read_box(x->ckpt, KIND, p->name, offset, extent, dtype, x->box, x->e);
}

static int write_plain(struct export *x, const struct hf_part *p, size_t tensor, enum dtype dtype)
{
	size_t bytes = dtype_rows[dtype].bytes, width = (size_t)p->shape[1];
	int64_t step = (int64_t)(CHUNK_BYTES / (width * bytes));
	if (!step)
		return err_set(x->e, EXIT_BAD_DATA, "tensor %s: a row of more than 32 MiB", p->name);
	for (int64_t row = 0; row < p->rows; row += step) {
		int64_t rows = p->rows - row < step ? p->rows - row : step;
		if (read_box(x, p, row, rows, 0, (int64_t)width, dtype) ||
		    st_write(x->writer, tensor, (size_t)(p->first_row + row) * width * bytes,
		             (size_t)rows * width * bytes, x->box, x->e))
			return x->e->code;
	}
	return 0;
}

static void turn(const char *from, char *to, size_t rows, size_t columns, size_t bytes)
{
	for (size_t r = 0; r < rows; r++)
		for (size_t c = 0; c < columns; c++)
			memcpy(to + (c * rows + r) * bytes, from + (r * columns + c) * bytes, bytes);
}

/* The file has [in, out], so a few of our columns are a few rows there. */
static int write_transposed(struct export *x, const struct hf_part *p, size_t tensor, enum dtype dtype)
{
	size_t bytes = dtype_rows[dtype].bytes, rows = (size_t)p->rows, width = (size_t)p->hf_shape[1];
	int64_t step = (int64_t)(CHUNK_BYTES / (rows * bytes));
	if (!step)
		return err_set(x->e, EXIT_BAD_DATA, "tensor %s: a column of more than 32 MiB", p->name);
	for (int64_t column = 0; column < p->shape[1]; column += step) {
		int64_t columns = p->shape[1] - column < step ? p->shape[1] - column : step;
		if (read_box(x, p, 0, p->rows, column, columns, dtype))
			return x->e->code;
		turn(x->box, x->turned, rows, (size_t)columns, bytes);
		for (int64_t c = 0; c < columns; c++)
			if (st_write(x->writer, tensor,
			             ((size_t)(column + c) * width + (size_t)p->first_row) * bytes,
			             rows * bytes, x->turned + (size_t)c * rows * bytes, x->e))
				return x->e->code;
	}
	return 0;
}

/* Nothing of the model may be left behind. */
static int refuse_more(struct export *x)
{
	size_t n = 0;
	for (size_t i = 0; i < ckpt_count(x->ckpt); i++)
		n += !strcmp(ckpt_entry(x->ckpt, i)->kind, KIND);
	if (n == x->plan.n)
		return 0;
	return err_set(x->e, EXIT_BAD_DATA,
	               "%s: holds %zu tensors (" KIND "), a %s model of its sizes has %zu",
	               ckpt_path(x->ckpt), n, hf_family_name(x->family), x->plan.n);
}

static int write_weights(struct export *x, size_t max_shard_bytes)
{
	if (st_write_create(x->dir, x->tensors, x->n_tensors, max_shard_bytes, &x->writer, x->e))
		return x->e->code;
	size_t tensor = 0;
	int rc = 0;
	x->box = mem_array(CHUNK_BYTES, 1);
	x->turned = mem_array(CHUNK_BYTES, 1);
	for (size_t i = 0; i < x->plan.n && !rc; i++) {
		const struct hf_part *p = &x->plan.parts[i];
		tensor += i && !p->first_row;
		enum dtype dtype = ckpt_find(x->ckpt, KIND, p->name)->dtype;
		rc = p->transposed ? write_transposed(x, p, tensor, dtype) : write_plain(x, p, tensor, dtype);
	}
	struct err second = {0}; /* the first cause is the one to tell */
	int closed = st_write_close(x->writer, rc ? &second : x->e);
	return rc ? rc : closed;
}

static int write_config(struct export *x)
{
	struct buf b = {0};
	char path[PATH_MAX];
	enum dtype dtype = ckpt_find(x->ckpt, KIND, x->plan.parts[0].name)->dtype;
	hf_config_put(&x->model, x->family, dtype, json_get(ckpt_meta(x->ckpt), "hf"), &b);
	int rc = snprintf(path, sizeof path, "%s/config.json", x->dir) >= (int)sizeof path
	                 ? err_set(x->e, EXIT_IO, "%s: path too long", x->dir)
	                 : sys_write_file(path, b.data, b.length, x->e);
	buf_free(&b);
	return rc;
}

int hf_export(struct ckpt *c, const char *dir, size_t max_shard_bytes, struct err *e)
{
	struct export x = {.ckpt = c, .dir = dir, .e = e};
	x.plan.arena = &x.arena;
	int rc = hf_model_read_json(json_get(ckpt_meta(c), "model"), ckpt_path(c), &x.arena, &x.model, e);
	if (!rc)
		rc = choose_family(&x);
	if (!rc)
		rc = hf_plan_make(&x.plan, &x.model, x.family, false, e);
	if (!rc)
		rc = plan_tensors(&x);
	if (!rc)
		rc = refuse_more(&x);
	if (!rc)
		rc = write_weights(&x, max_shard_bytes);
	if (!rc)
		rc = write_config(&x);
	free(x.tensors);
	free(x.box);
	free(x.turned);
	free(x.plan.parts);
	arena_free(&x.arena);
	return rc;
}
