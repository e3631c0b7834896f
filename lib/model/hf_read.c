/* A Hugging Face folder as a source of logical parameters. */
#include "base/err.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/sys.h"
#include "model/hf.h"

#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CONFIG_BYTES = 16 << 20, CHUNK_BYTES = 4 << 20 };

struct hf {
	struct arena arena;
	char *dir;
	struct json *config;
	struct model_config model;
	enum hf_family family;
	struct st_file *file;
	struct hf_plan plan;
	const struct st_tensor **tensors; /* of each part */
	size_t *by_name;                  /* parts sorted by our name */
};

/* Element i of bytes from the file, which are aligned to nothing. */
static float load(enum st_dtype t, const char *p, size_t i)
{
	uint16_t h;
	float x;
	if (t == ST_F32) {
		memcpy(&x, p + 4 * i, 4);
		return x;
	}
	memcpy(&h, p + 2 * i, 2);
	return t == ST_BF16 ? bf16_to_f32(h) : f16_to_f32(h);
}

static const struct {
	enum st_dtype st;
	enum dtype ours;
	bool same; /* bit for bit */
} dtypes[] = {{ST_F32, DT_f32, true}, {ST_BF16, DT_bf16, true}, {ST_F16, DT_f32, false}};
enum { N_DTYPES = sizeof dtypes / sizeof *dtypes };

static int find_dtype(enum st_dtype t)
{
	for (int i = 0; i < N_DTYPES; i++)
		if (dtypes[i].st == t)
			return i;
	return -1;
}

/* n elements, `stride` elements apart in `out`. */
static void store(enum st_dtype from, const char *p, size_t n, enum dtype to, char *out, size_t stride)
{
	int row = find_dtype(from);
	size_t bytes = dtype_rows[to].bytes;
	bool same = dtypes[row].same && dtypes[row].ours == to;
	if (same && stride == 1) {
		memcpy(out, p, n * bytes);
		return;
	}
	for (size_t i = 0; i < n; i++) {
		char *o = out + i * stride * bytes;
		if (same) {
			memcpy(o, p + i * bytes, bytes);
		} else if (to == DT_f32) {
			float x = load(from, p, i);
			memcpy(o, &x, sizeof x);
		} else {
			uint16_t h = half_from_f32(to, load(from, p, i));
			memcpy(o, &h, sizeof h);
		}
	}
}

static int read_config(struct hf *h, struct err *e)
{
	char path[PATH_MAX];
	char *text = NULL;
	size_t bytes = 0;
	if (snprintf(path, sizeof path, "%s/config.json", h->dir) >= (int)sizeof path)
		return err_set(e, EXIT_NO_INPUT, "%s: path too long", h->dir);
	int rc = sys_read_file(path, MAX_CONFIG_BYTES, &text, &bytes, e);
	if (!rc)
		rc = json_parse(&h->arena, path, text, bytes, &h->config, e);
	if (!rc)
		rc = hf_config_read(h->config, path, &h->arena, &h->model, &h->family, e);
	free(text);
	return rc;
}

/* Older GPT-2 files leave the prefix out. */
static const struct st_tensor *find_tensor(const struct hf *h, const char *name)
{
	static const char prefix[] = "transformer.";
	const struct st_tensor *t = st_find(h->file, name);
	if (!t && !strncmp(name, prefix, sizeof prefix - 1))
		t = st_find(h->file, name + sizeof prefix - 1);
	return t;
}

static void put_shape(char *out, size_t cap, int nd, const int64_t *shape)
{
	size_t n = 0;
	for (int i = 0; i < nd && n < cap; i++)
		n += (size_t)snprintf(out + n, cap - n, i ? ", %lld" : "%lld", (long long)shape[i]);
	if (!nd)
		snprintf(out, cap, "scalar");
}

/* The shape that a part's tensor has in the file; the number of dimensions is returned. */
static int file_shape(const struct hf_part *p, int64_t shape[static 3])
{
	int n = 0;
	if (p->hf_blocks)
		shape[n++] = p->hf_blocks;
	shape[n++] = p->hf_blocks ? p->hf_shape[0] / p->hf_blocks : p->hf_shape[0];
	if (p->nd > 1)
		shape[n++] = p->hf_shape[1];
	return n;
}

static int bind_part(struct hf *h, size_t i, struct err *e)
{
	const struct hf_part *p = &h->plan.parts[i];
	const struct st_tensor *t = find_tensor(h, p->hf_name);
	int64_t shape[3];
	int nd = file_shape(p, shape);
	if (!t)
		return err_set(e, EXIT_BAD_DATA, "%s: tensor %s is missing", h->dir, p->hf_name);
	if (t->nd != nd || memcmp(t->shape, shape, (size_t)nd * sizeof *shape)) {
		char got[200], want[80];
		put_shape(got, sizeof got, t->nd, t->shape);
		put_shape(want, sizeof want, nd, shape);
		return err_set(e, EXIT_BAD_DATA, "%s: tensor %s has shape [%s]; config.json makes it [%s]",
		               h->dir, t->name, got, want);
	}
	if (find_dtype(t->dtype) < 0)
		return err_set(e, EXIT_BAD_DATA, "%s: tensor %s is %s; F32, BF16 and F16 can be read", h->dir,
		               t->name, st_dtype_name(t->dtype));
	h->tensors[i] = t;
	return 0;
}

static bool ends_with(const char *s, const char *end)
{
	size_t n = strlen(s), m = strlen(end);
	return n >= m && !strcmp(s + n - m, end);
}

/* Buffers that some versions wrote among the weights; the output layer of a tied model. */
static bool is_ignored(const struct hf *h, const char *name)
{
	if (ends_with(name, ".attn.bias") || ends_with(name, ".attn.masked_bias") ||
	    ends_with(name, ".rotary_emb.inv_freq"))
		return true;
	return !strcmp(name, "lm_head.weight") && !h->model.untie_embeddings_and_output_weights;
}

/* Layers behind the last that predict further tokens (DeepSeek-AI 2024): they can be left out. */
static bool is_further_layer(const struct hf *h, const char *name)
{
	static const char prefix[] = "model.layers.";
	int64_t more = json_get_integer(h->config, "num_nextn_predict_layers", 0);
	const char *number = name + sizeof prefix - 1;
	if (more < 1 || strncmp(name, prefix, sizeof prefix - 1) || strspn(number, "0123456789") > 9)
		return false;
	char *end;
	long layer = strtol(number, &end, 10);
	return end != number && *end == '.' && layer >= h->model.num_layers &&
	       layer - h->model.num_layers < more;
}

static int compare_pointers(const void *a, const void *b)
{
	const struct st_tensor *x = *(const struct st_tensor *const *)a,
	                       *y = *(const struct st_tensor *const *)b;
	return (x > y) - (x < y);
}

/* A tensor that nothing reads means that the model is another one than we think. */
static int refuse_unknown(const struct hf *h, struct err *e)
{
	size_t n = h->plan.n, further = 0;
	const struct st_tensor **known = mem_array(n, sizeof *known);
	int rc = 0;
	memcpy(known, h->tensors, n * sizeof *known);
	qsort(known, n, sizeof *known, compare_pointers);
	for (size_t i = 0; i < st_count(h->file) && !rc; i++) {
		const struct st_tensor *t = st_get(h->file, i);
		if (bsearch(&t, known, n, sizeof *known, compare_pointers) || is_ignored(h, t->name))
			continue;
		if (is_further_layer(h, t->name))
			further++;
		else
			rc = err_set(e, EXIT_BAD_DATA,
			             "%s: tensor %.200s belongs to no part of a %s model as config.json "
			             "describes it",
			             h->dir, t->name, hf_family_name(h->family));
	}
	if (!rc && further)
		log_warn("%s: %zu tensors of layers that predict further tokens (num_nextn_predict_layers) "
		         "are "
		         "left out",
		         h->dir, further);
	free(known);
	return rc;
}

static int compare_by_name(const void *a, const void *b, void *parts)
{
	const struct hf_part *p = parts;
	return strcmp(p[*(const size_t *)a].name, p[*(const size_t *)b].name);
}

/* transformers 5 may write all experts of a layer as one tensor; the first layer that has any tells. */
static bool has_fused_experts(const struct hf *h)
{
	char name[80];
	struct err ignored = {0};
	int64_t n = h->model.num_layers, i = 0;
	bool *moe = mem_array((size_t)n, sizeof *moe);
	if (model_moe_layers(&h->model, moe, &ignored))
		i = n;
	while (i < n && !moe[i])
		i++;
	free(moe);
	snprintf(name, sizeof name, "model.layers.%lld.mlp.experts.gate_up_proj", (long long)i);
	return i < n && find_tensor(h, name);
}

static int bind(struct hf *h, struct err *e)
{
	struct err why = {0};
	h->plan.arena = &h->arena;
	if (hf_plan_make(&h->plan, &h->model, h->family, has_fused_experts(h), &why))
		return err_set(e, EXIT_BAD_DATA, "%s/config.json: %s", h->dir, why.text);
	h->tensors = mem_array(h->plan.n, sizeof *h->tensors);
	h->by_name = mem_array(h->plan.n, sizeof *h->by_name);
	for (size_t i = 0; i < h->plan.n; i++) {
		h->by_name[i] = i;
		if (bind_part(h, i, e))
			return e->code;
	}
	qsort_r(h->by_name, h->plan.n, sizeof *h->by_name, compare_by_name, h->plan.parts);
	return refuse_unknown(h, e);
}

int hf_open(const char *dir, struct hf **out, struct err *e)
{
	struct hf *h = mem_array(1, sizeof *h);
	h->dir = arena_strdup(&h->arena, dir);
	int rc = read_config(h, e);
	if (!rc)
		rc = st_open(dir, &h->file, e);
	if (!rc)
		rc = bind(h, e);
	if (rc)
		hf_close(h);
	else
		*out = h;
	return rc;
}

void hf_close(struct hf *h)
{
	if (!h)
		return;
	st_close(h->file);
	free(h->plan.parts);
	free(h->tensors);
	free(h->by_name);
	arena_free(&h->arena);
	free(h);
}

bool hf_is_folder(const char *path)
{
	char name[PATH_MAX];
	char *text = NULL;
	size_t bytes = 0;
	struct err e = {0};
	struct arena a = {0};
	struct json *v = NULL;
	if (snprintf(name, sizeof name, "%s/config.json", path) >= (int)sizeof name ||
	    sys_read_file(name, MAX_CONFIG_BYTES, &text, &bytes, &e))
		return false;
	bool is =
	        !json_parse(&a, name, text, bytes, &v, &e) && json_get_string(v, "model_type", NULL) != NULL;
	arena_free(&a);
	free(text);
	return is;
}

const struct model_config *hf_model(const struct hf *h)
{
	return &h->model;
}

enum hf_family hf_family_of(const struct hf *h)
{
	return h->family;
}

const struct json *hf_config_json(const struct hf *h)
{
	return h->config;
}

size_t hf_count(const struct hf *h)
{
	return h->plan.n;
}

const struct hf_part *hf_part(const struct hf *h, size_t i)
{
	return &h->plan.parts[i];
}

enum dtype hf_dtype(const struct hf *h, size_t i)
{
	return dtypes[find_dtype(h->tensors[i]->dtype)].ours;
}

/* What of a box comes from the file: rows behind the vocabulary do not. */
struct request {
	const struct hf *h;
	const struct hf_part *p;
	const struct st_tensor *t;
	int64_t row, rows, column, columns;
	enum dtype dtype;
	char *out;
	char *chunk; /* CHUNK_BYTES */
	struct err *e;
};

/* `n` elements from element `from` of the HF tensor to element `to` of the box, `stride` apart there. */
static int copy_run(struct request *q, int64_t from, int64_t n, int64_t to, int64_t stride)
{
	size_t bytes = st_dtype_bytes(q->t->dtype), most = CHUNK_BYTES / bytes;
	while (n > 0) {
		size_t k = (size_t)n < most ? (size_t)n : most;
		if (st_read(q->h->file, q->t, (size_t)from * bytes, k * bytes, q->chunk, q->e))
			return q->e->code;
		store(q->t->dtype, q->chunk, k, q->dtype, q->out + (size_t)to * dtype_rows[q->dtype].bytes,
		      (size_t)stride);
		from += (int64_t)k;
		to += (int64_t)k * stride;
		n -= (int64_t)k;
	}
	return 0;
}

static int copy_plain(struct request *q)
{
	int64_t width = q->p->nd > 1 ? q->p->hf_shape[1] : 1, first = q->p->first_row + q->row;
	if (q->columns == width)
		return copy_run(q, first * width, q->rows * width, 0, 1);
	for (int64_t r = 0; r < q->rows; r++)
		if (copy_run(q, (first + r) * width + q->column, q->columns, r * q->columns, 1))
			return q->e->code;
	return 0;
}

/* The file's [in, out]: one run of the box's rows for each of its columns. */
static int copy_transposed(struct request *q)
{
	int64_t width = q->p->hf_shape[1];
	for (int64_t c = 0; c < q->columns; c++)
		if (copy_run(q, (q->column + c) * width + q->p->first_row + q->row, q->rows, c, q->columns))
			return q->e->code;
	return 0;
}

static int find_part(const struct hf *h, const char *name, size_t *out, struct err *e)
{
	size_t lo = 0, hi = h->plan.n;
	while (lo < hi) {
		size_t mid = lo + (hi - lo) / 2;
		int c = strcmp(name, h->plan.parts[h->by_name[mid]].name);
		if (!c) {
			*out = h->by_name[mid];
			return 0;
		}
		if (c < 0)
			hi = mid;
		else
			lo = mid + 1;
	}
	return err_set(e, EXIT_BAD_DATA, "%s: nothing there for the parameter %s", h->dir, name);
}

int hf_read_box(const struct hf *h, const char *name, const int64_t *offset, const int64_t *extent,
                enum dtype dtype, void *out, struct err *e)
{
	size_t i = 0;
	if (dtype != DT_f32 && !dtype_is_half(dtype))
		return err_set(e, EXIT_INTERNAL, "%s: weights are read as f32, bf16 or f16", name);
	if (find_part(h, name, &i, e))
		return e->code;
	const struct hf_part *p = &h->plan.parts[i];
	for (int d = 0; d < p->nd; d++)
		if (offset[d] < 0 || extent[d] < 1 || offset[d] > p->shape[d] ||
		    extent[d] > p->shape[d] - offset[d])
			return err_set(e, EXIT_BAD_DATA,
			               "%s: a box of %s reaches out of its shape [%lld, %lld]", h->dir, name,
			               (long long)p->shape[0], (long long)p->shape[1]);
	struct request q = {.h = h,
	                    .p = p,
	                    .t = h->tensors[i],
	                    .row = offset[0],
	                    .rows = extent[0],
	                    .columns = 1,
	                    .dtype = dtype,
	                    .out = out,
	                    .e = e};
	if (p->nd > 1) {
		q.column = offset[1];
		q.columns = extent[1];
	}
	int64_t real = p->rows > q.row ? p->rows - q.row : 0;
	size_t row_bytes = (size_t)q.columns * dtype_rows[dtype].bytes;
	if (real < q.rows) {
		memset(q.out + (size_t)real * row_bytes, 0, (size_t)(q.rows - real) * row_bytes);
		q.rows = real;
	}
	if (!q.rows)
		return 0;
	q.chunk = mem_array(CHUNK_BYTES, 1);
	int rc = p->transposed ? copy_transposed(&q) : copy_plain(&q);
	free(q.chunk);
	return rc;
}
