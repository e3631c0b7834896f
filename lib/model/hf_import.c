/* A Hugging Face folder's weights as a checkpoint of step 0, tensor by tensor. */
#include "base/err.h"
#include "base/json.h"
#include "base/mem.h"
#include "ckpt/ckpt.h"
#include "model/hf.h"

#include <stdlib.h>

static void put_meta(const struct hf *h, struct buf *b)
{
	static const char *const ids[] = {"bos_token_id", "eos_token_id", "pad_token_id"};
	buf_puts(b, "{\"model\": ");
	hf_model_put_json(hf_model(h), b);
	buf_printf(b, ", \"hf\": {\"model_type\": \"%s\"", hf_family_name(hf_family_of(h)));
	for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
		int64_t id = json_get_integer(hf_config_json(h), ids[i], -1);
		if (id >= 0)
			buf_printf(b, ", \"%s\": %lld", ids[i], (long long)id);
	}
	buf_puts(b, "}}");
}

static struct ckpt_tensor *make_rows(const struct hf *h)
{
	struct ckpt_tensor *rows = mem_array(hf_count(h), sizeof *rows);
	for (size_t i = 0; i < hf_count(h); i++) {
		const struct hf_part *p = hf_part(h, i);
		rows[i] = (struct ckpt_tensor){.name = p->name,
		                               .kind = "model",
		                               .dtype = hf_dtype(h, i),
		                               .nd = p->nd,
		                               .shape = {p->shape[0], p->shape[1]},
		                               .extent = {p->shape[0], p->shape[1]}};
	}
	return rows;
}

/* One tensor in memory at a time. */
static int write_tensor(const struct hf *h, struct ckpt_shard *w, size_t i, const struct ckpt_tensor *row,
                        struct err *e)
{
	size_t n = (size_t)row->extent[0] * (size_t)(row->nd > 1 ? row->extent[1] : 1);
	void *data = mem_array(n, dtype_rows[row->dtype].bytes);
	int rc = hf_read_box(h, row->name, row->offset, row->extent, row->dtype, data, e);
	if (!rc)
		rc = ckpt_shard_write(w, i, data, e);
	free(data);
	return rc;
}

static int write_shard(const struct hf *h, const struct ckpt_save *s, struct buf *record, struct err *e)
{
	struct ckpt_shard *w;
	struct err second = {0}; /* the first cause is the one to tell */
	if (ckpt_shard_create(s, &w, e))
		return e->code;
	int rc = 0;
	for (size_t i = 0; i < s->n_tensors && !rc; i++)
		rc = write_tensor(h, w, i, &s->tensors[i], e);
	int closed = ckpt_shard_close(w, rc ? NULL : record, rc ? &second : e);
	return rc ? rc : closed;
}

int hf_import(const struct hf *h, const char *dir, struct err *e)
{
	struct buf record = {0}, meta = {0};
	put_meta(h, &meta);
	struct ckpt_tensor *rows = make_rows(h);
	struct ckpt_save s = {.dir = dir,
	                      .world_size = 1,
	                      .tensors = rows,
	                      .n_tensors = hf_count(h),
	                      .meta_json = meta.data};
	int rc = ckpt_save_begin(&s, e);
	if (!rc)
		rc = write_shard(h, &s, &record, e);
	if (!rc)
		rc = ckpt_save_commit(&s, record.data, record.length, e);
	free(rows);
	buf_free(&record);
	buf_free(&meta);
	return rc;
}
