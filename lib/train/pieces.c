#include "train/pieces.h"
#include "base/hash.h"
#include "base/rng.h"

#include <stdlib.h>
#include <string.h>

/* Elements that are on the host at a time, so that beginning takes no memory that training does not need. */
enum { SLICE = 1 << 18 };

struct list {
	struct piece *item;
	size_t n, cap;
};

static int64_t width_of(const struct part *part)
{
	return part->nd > 1 ? part->extent[1] : 1;
}

/* Rows [row, row + rows), columns [column, column + columns) of the rank's box of a part, which lie at
 * `first`. */
static void add_box(struct list *l, const struct part *part, int64_t row, int64_t rows, int64_t column,
                    int64_t columns, int32_t value, int64_t first)
{
	if (rows <= 0 || columns <= 0)
		return;
	l->item = mem_grow(l->item, l->n, &l->cap, sizeof *l->item);
	l->item[l->n++] = (struct piece){.part = part,
	                                 .offset = {part->offset[0] + row, part->offset[1] + column},
	                                 .extent = {rows, columns},
	                                 .value = value,
	                                 .first = first};
}

/* Elements [from, to) of a part, counted row by row: the end of a row, whole rows, the begin of one. */
static void add_range(struct list *l, const struct part *part, int64_t from, int64_t to, int32_t value,
                      int64_t first)
{
	int64_t width = width_of(part);
	int64_t head = (width - from % width) % width;
	if (head > to - from)
		head = to - from;
	add_box(l, part, from / width, head > 0, from % width, head, value, first);
	int64_t rows = (to - from - head) / width;
	add_box(l, part, (from + head) / width, rows, 0, width, value, first + head);
	int64_t tail = to - from - head - rows * width;
	add_box(l, part, to / width, tail > 0, 0, tail, value, first + head + rows * width);
}

static void add_part(struct list *l, const struct part *part, int64_t at, const struct shard_slice *s)
{
	int64_t begin = at + part->local_row * width_of(part), end = begin + part->extent[0] * width_of(part);
	int64_t from = begin > s->first ? begin : s->first;
	int64_t to = end < s->first + s->count ? end : s->first + s->count;
	if (from < to)
		add_range(l, part, from - begin, to - begin, s->value, from - s->first);
}

size_t pieces_list(const struct program *t, enum shard_state state, struct piece **out)
{
	struct list l = {0};
	for (size_t k = 0; k < t->model.n_param; k++) {
		const struct param *q = &t->model.param[k];
		const struct shard_slice *s = &t->sharding.bucket[t->sharding.bucket_of[k]].state[state];
		for (int32_t i = 0; i < q->n_parts && s->value != NONE; i++)
			add_part(&l, &t->model.part[q->first_part + i], t->sharding.at[k], s);
	}
	*out = l.item;
	return l.n;
}

int64_t piece_count(const struct piece *q)
{
	return q->extent[0] * q->extent[1];
}

static const struct bucket *bucket_of(const struct program *t, const struct piece *q, enum shard_state state)
{
	for (size_t i = 0; i < t->sharding.n; i++)
		if (t->sharding.bucket[i].state[state].value == q->value)
			return &t->sharding.bucket[i];
	return NULL;
}

bool piece_is_owned(const struct program *t, const struct piece *q, enum shard_state state)
{
	const struct value *v = &t->prog.value[q->value];
	const struct bucket *b = bucket_of(t, q, state);
	uint32_t copies = 0;
	if (!b || !b->like.counts)
		return false;
	for (int a = 0; a < AXIS_COUNT; a++)
		if (prog_lies_along(v, a) && t->prog.axis_size[a] > 1 && v->place[a] == PLACE_REPLICATED)
			copies |= 1u << a;
	if (!copies)
		return true;
	uint64_t h = hash_bytes(q->part->name, strlen(q->part->name), (uint64_t)state);
	h = hash_bytes(q->offset, sizeof q->offset, h);
	int ranks = mesh_group_size(&t->mesh, copies);
	return (int)(h % (uint64_t)ranks) == mesh_group(&t->mesh, copies, t->rank, NULL);
}

void piece_read(const struct program *t, struct exec *x, const struct piece *q, float *host)
{
	int64_t n = piece_count(q);
	if (t->prog.value[q->value].dtype == DT_f32) {
		exec_download_part(x, q->value, q->first, n, host);
		return;
	}
	uint16_t *half = mem_array((size_t)n, sizeof *half);
	exec_download_part(x, q->value, q->first, n, half);
	for (int64_t i = 0; i < n; i++)
		host[i] = half_to_f32(t->prog.value[q->value].dtype, half[i]);
	free(half);
}

void piece_write(const struct program *t, struct exec *x, const struct piece *q, const float *host)
{
	int64_t n = piece_count(q);
	if (t->prog.value[q->value].dtype == DT_f32) {
		exec_upload_part(x, q->value, q->first, n, host);
		return;
	}
	uint16_t *half = mem_array((size_t)n, sizeof *half);
	for (int64_t i = 0; i < n; i++)
		half[i] = half_from_f32(t->prog.value[q->value].dtype, host[i]);
	exec_upload_part(x, q->value, q->first, n, half);
	free(half);
}

/* Rows [row, row + rows) of a piece. */
static struct piece piece_rows(const struct piece *q, int64_t row, int64_t rows)
{
	struct piece cut = *q;
	cut.offset[0] += row;
	cut.extent[0] = rows;
	cut.first += row * q->extent[1];
	return cut;
}

struct values {
	uint64_t seed;
	const float *normal; /* [SLICE], for whatever is drawn; NULL: each draws its own */
};

static void put_rows(const struct program *t, struct exec *x, const struct values *v, const struct piece *q)
{
	struct part box = *q->part;
	int64_t n = piece_count(q);
	memcpy(box.offset, q->offset, sizeof box.offset);
	memcpy(box.extent, q->extent, sizeof box.extent);
	float *host = mem_array((size_t)n, sizeof *host);
	if (v->normal && box.init == INIT_NORMAL)
		for (int64_t i = 0; i < n; i++)
			host[i] = (float)box.std * v->normal[i % SLICE];
	else
		part_init(&box, v->seed, host);
	piece_write(t, x, q, host);
	free(host);
}

static void put_all(const struct program *t, struct exec *x, enum shard_state state, const struct values *v)
{
	struct piece *list;
	size_t n = pieces_list(t, state, &list);
	for (size_t i = 0; i < n; i++) {
		int64_t rows = list[i].extent[0],
		        some = list[i].extent[1] < SLICE ? SLICE / list[i].extent[1] : 1;
		for (int64_t row = 0; row < rows; row += some) {
			struct piece cut = piece_rows(&list[i], row, row + some < rows ? some : rows - row);
			put_rows(t, x, v, &cut);
		}
	}
	free(list);
}

void pieces_init(const struct program *t, struct exec *x, uint64_t seed)
{
	put_all(t, x, SHARD_PARAM, &(struct values){.seed = seed});
}

void pieces_fill(const struct program *t, struct exec *x, uint64_t seed)
{
	float *normal = mem_array(SLICE, sizeof *normal);
	struct values v = {seed, normal};
	rng_normal(rng_key(seed, "fill"), 0, SLICE, 0, 1, normal);
	put_all(t, x, SHARD_PARAM, &v);
	put_all(t, x, SHARD_MASTER, &v);
	free(normal);
}

void pieces_refresh_masters(const struct program *t, struct exec *x)
{
	uint16_t *half = mem_array(SLICE, sizeof *half);
	float *full = mem_array(SLICE, sizeof *full);
	for (size_t i = 0; i < t->sharding.n; i++) {
		const struct shard_slice *to = &t->sharding.bucket[i].state[SHARD_MASTER],
		                         *from = &t->sharding.bucket[i].state[SHARD_PARAM];
		for (int64_t at = 0; to->value != NONE && at < to->count; at += SLICE) {
			int64_t n = to->count - at < SLICE ? to->count - at : SLICE;
			exec_download_part(x, from->value, to->first - from->first + at, n, half);
			for (int64_t j = 0; j < n; j++)
				full[j] = half_to_f32(t->prog.value[from->value].dtype, half[j]);
			exec_upload_part(x, to->value, at, n, full);
		}
	}
	free(half);
	free(full);
}
