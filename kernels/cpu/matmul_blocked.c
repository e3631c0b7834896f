/* The own matrix product: operands are packed once into panels that the register tile reads in order, then
 * threads share blocks of C. A block is small enough that its part of B stays in the second-level cache; each
 * element of C is summed by one thread, in an order that depends on k alone. */
#include "kernels/cpu/matmul.h"

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/matmul_tile.h"

enum {
	DEPTH = 384,          /* words of depth summed in registers at a time: a panel of A fits in 32 KiB */
	MAX_DEPTH = 4096,     /* words of depth packed at a time */
	MAX_PACKED = 8 << 20, /* words of one packed operand */
	BLOCK_ROWS = 32 * TILE_ROWS,
	BLOCK_COLUMNS = 256,
};

struct extent {
	int64_t begin, count;
};

/* One packed part of the problem. */
struct job {
	const struct matmul *g;
	const struct tile *tile;
	tile_pack_fn *pack;
	tile_product_fn *product;
	struct tile_source source_a, source_b;
	int64_t word_elements, depth; /* elements of depth in a word; words of depth a product */
	struct extent m, n, k;        /* what is packed; k in words */
	uint32_t *a, *b;
	float *wide; /* sums of [m,n] that wait for further depth; NULL where one part has all of it */
	int64_t wide_pitch;
	int64_t blocks_down, blocks_across;
	bool first, last; /* part of the depth */
};

static int64_t ceil_div(int64_t a, int64_t b)
{
	return (a + b - 1) / b;
}

static int64_t round_up(int64_t a, int64_t b)
{
	return ceil_div(a, b) * b;
}

static int64_t min64(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static void pack_panel(const struct job *j, const struct tile_source *source, const struct extent *lanes,
                       int width, int64_t panel, uint32_t *packed)
{
	int64_t first = panel * width, begin = j->k.begin * j->word_elements;
	int64_t end = min64(begin + j->k.count * j->word_elements, j->g->k);
	j->pack(source, lanes->begin + first, (int)min64(lanes->count - first, width), width, begin, end,
	        packed + first * j->k.count);
}

static void pack_a_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	for (int64_t i = begin; i < end; i++)
		pack_panel(j, &j->source_a, &j->m, TILE_ROWS, i, j->a);
}

static void pack_b_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct job *j = job;
	for (int64_t i = begin; i < end; i++)
		pack_panel(j, &j->source_b, &j->n, j->tile->columns, i, j->b);
}

void matmul_write_row(const struct matmul *g, int64_t row, int64_t column, int64_t n, float *sums)
{
	const struct tensor c = {.data = g->c, .dtype = (uint8_t)g->c_dtype};
	float buffer[CPU_BLOCK];
	for (int64_t i = 0; i < n; i += CPU_BLOCK) {
		int64_t count = min64(n - i, CPU_BLOCK), at = row * g->n + column + i;
		float *sum = sums + i;
		if (g->bias) {
			const float *bias = cpu_read(g->bias, column + i, count, buffer);
			for (int64_t l = 0; l < count; l++)
				sum[l] += bias[l];
		}
		if (g->acc && (void *)sum != (float *)g->c + at) {
			const float *old = cpu_read(&c, at, count, buffer);
			for (int64_t l = 0; l < count; l++)
				sum[l] += old[l];
		}
		cpu_write(&c, at, count, sum);
	}
}

/* Where a block's sums lie. */
struct sums {
	float *data;
	int64_t pitch;
	int64_t rows, columns; /* that exist in memory: beyond them a tile goes through a copy */
};

static void tile_into(const struct job *j, const struct sums *to, int64_t row, int64_t column, int64_t depth,
                      const uint32_t *a, const uint32_t *b, bool add)
{
	float *c = to->data + row * to->pitch + column;
	int64_t rows = min64(to->rows - row, TILE_ROWS),
	        columns = min64(to->columns - column, j->tile->columns);
	if (rows == TILE_ROWS && columns == j->tile->columns) {
		j->product(depth, a, b, c, to->pitch, add);
		return;
	}
	float edge[TILE_ROWS * TILE_MAX_COLUMNS];
	j->product(depth, a, b, edge, TILE_MAX_COLUMNS, false);
	for (int64_t i = 0; i < rows; i++)
		for (int64_t l = 0; l < columns; l++) {
			float old = add ? c[i * to->pitch + l] : 0;
			c[i * to->pitch + l] = old + edge[i * TILE_MAX_COLUMNS + l];
		}
}

/* One block of the packed part, all its depth. */
static void block_multiply(const struct job *j, const struct sums *to, const struct extent *m,
                           const struct extent *n, bool add)
{
	for (int64_t k = 0; k < j->k.count; k += j->depth) {
		int64_t depth = min64(j->depth, j->k.count - k);
		for (int64_t r = 0; r < m->count; r += TILE_ROWS)
			for (int64_t l = 0; l < n->count; l += j->tile->columns)
				tile_into(j, to, r, l, depth,
				          j->a + (m->begin + r) * j->k.count + k * TILE_ROWS,
				          j->b + (n->begin + l) * j->k.count + k * j->tile->columns,
				          add || k);
	}
}

/* Sums go straight into an f32 C, else into `wide` or a buffer of the thread's, both padded to whole tiles.
 */
static struct sums sums_at(const struct job *j, struct stream *s, int part, const struct extent *m,
                           const struct extent *n)
{
	int64_t rows = round_up(m->count, TILE_ROWS), columns = round_up(n->count, j->tile->columns);
	if (j->wide)
		return (struct sums){j->wide + m->begin * j->wide_pitch + n->begin, j->wide_pitch, rows,
		                     columns};
	if (j->g->c_dtype == DT_f32)
		return (struct sums){(float *)j->g->c + (j->m.begin + m->begin) * j->g->n + j->n.begin +
		                             n->begin,
		                     j->g->n, m->count, n->count};
	return (struct sums){cpu_scratch(s, part, (size_t)(rows * columns) * sizeof(float)), columns, rows,
	                     columns};
}

/* Block i of `blocks` nearly equal ones, in whole tiles. */
static struct extent block_at(int64_t total, int64_t tile, int64_t blocks, int64_t i)
{
	int64_t tiles = ceil_div(total, tile), begin = tiles * i / blocks * tile;
	return (struct extent){begin, min64(tiles * (i + 1) / blocks * tile, total) - begin};
}

static void block_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	const struct job *j = job;
	const struct matmul *g = j->g;
	bool in_place = !j->wide && g->c_dtype == DT_f32;
	for (int64_t i = begin; i < end; i++) {
		struct extent m = block_at(j->m.count, TILE_ROWS, j->blocks_down, i / j->blocks_across);
		struct extent n =
		        block_at(j->n.count, j->tile->columns, j->blocks_across, i % j->blocks_across);
		struct sums to = sums_at(j, s, part, &m, &n);
		block_multiply(j, &to, &m, &n, !j->first || (in_place && g->acc));
		if (j->last && (!in_place || g->bias))
			for (int64_t r = 0; r < m.count; r++)
				matmul_write_row(g, j->m.begin + m.begin + r, j->n.begin + n.begin, n.count,
				                 to.data + r * to.pitch);
	}
}

/* As few blocks as the caches allow, more where threads would have no work. */
static void choose_blocks(struct job *j, int num_threads)
{
	int64_t down = ceil_div(j->m.count, TILE_ROWS), across = ceil_div(j->n.count, j->tile->columns);
	int64_t want = num_threads > 1 ? 4 * num_threads : 1;
	j->blocks_down = ceil_div(j->m.count, BLOCK_ROWS);
	j->blocks_across = ceil_div(j->n.count, BLOCK_COLUMNS);
	while (j->blocks_down * j->blocks_across < want &&
	       j->blocks_down * j->blocks_across < down * across) {
		bool wide = across * j->blocks_down * j->tile->columns >= down * j->blocks_across * TILE_ROWS;
		if ((wide || j->blocks_down == down) && j->blocks_across < across)
			j->blocks_across = min64(2 * j->blocks_across, across);
		else
			j->blocks_down = min64(2 * j->blocks_down, down);
	}
}

/* Cuts [0, total) into pieces of `size`, the last one shorter. */
static struct extent piece(int64_t begin, int64_t size, int64_t total)
{
	return (struct extent){begin, min64(size, total - begin)};
}

/* Every part of the depth of one super block of C. `packed_b` says whose panels lie in j->b, so that a B that
 * fits as a whole is packed once. */
static void run_super_block(struct stream *s, struct job *j, int64_t words, int64_t size,
                            struct extent *packed_b)
{
	for (int64_t k = 0; k < words; k += size) {
		j->k = piece(k, size, words);
		j->first = k == 0;
		j->last = k + size >= words;
		cpu_parallel(s, ceil_div(j->m.count, TILE_ROWS), 4, pack_a_part, j);
		if (size < words || packed_b->begin != j->n.begin)
			cpu_parallel(s, ceil_div(j->n.count, j->tile->columns), 2, pack_b_part, j);
		*packed_b = j->n;
		choose_blocks(j, s->num_threads);
		cpu_parallel(s, j->blocks_down * j->blocks_across, 1, block_part, j);
	}
}

static struct job job_init(const struct matmul *g, const struct tile *tile)
{
	bool pairs = g->dtype == DT_bf16 && tile->product_pair;
	enum tile_word word = pairs ? WORD_BF16_PAIR : tile_word_of(g->dtype);
	return (struct job){.g = g,
	                    .tile = tile,
	                    .pack = tile->pack[word],
	                    .product = pairs ? tile->product_pair : tile->product,
	                    .source_a = {g->a, matmul_a_pitch(g), g->a_transposed},
	                    .source_b = {g->b, g->b_transposed ? g->k : g->n, !g->b_transposed},
	                    .word_elements = pairs ? 2 : 1};
}

/* How much of the problem is packed at a time: elements of m and n, words of k; whole panels. */
struct packed {
	int64_t words, m, n, k;
	bool wide; /* the depth does not fit, and sums in C would be rounded */
};

static struct packed pack_sizes(struct job *j)
{
	const struct matmul *g = j->g;
	struct packed p = {.words = ceil_div(g->k, j->word_elements)};
	j->depth = ceil_div(p.words, ceil_div(p.words, DEPTH));
	p.k = min64(p.words, MAX_DEPTH / j->depth * j->depth);
	p.m = min64(round_up(g->m, TILE_ROWS), MAX_PACKED / p.k / BLOCK_ROWS * BLOCK_ROWS);
	p.n = min64(round_up(g->n, j->tile->columns), MAX_PACKED / p.k / BLOCK_COLUMNS * BLOCK_COLUMNS);
	p.wide = p.k < p.words && g->c_dtype != DT_f32;
	return p;
}

static size_t packed_bytes(const struct packed *p)
{
	return (size_t)(p->m * p->k + p->n * p->k + (p->wide ? p->m * p->n : 0)) * sizeof(uint32_t);
}

void matmul_blocked_with(struct stream *s, const struct matmul *g, const struct tile *tile)
{
	struct job j = job_init(g, tile);
	struct packed p = pack_sizes(&j);
	j.a = cpu_scratch(s, CPU_SHARED, packed_bytes(&p));
	j.b = j.a + p.m * p.k;
	j.wide = p.wide ? (float *)(j.b + p.n * p.k) : NULL;
	j.wide_pitch = p.n;
	for (int64_t n = 0; n < g->n; n += p.n) {
		struct extent packed_b = {-1, 0};
		j.n = piece(n, p.n, g->n);
		for (int64_t m = 0; m < g->m; m += p.m) {
			j.m = piece(m, p.m, g->m);
			run_super_block(s, &j, p.words, p.k, &packed_b);
		}
	}
}

/* The largest block of one super block, as sums_at pads it. */
static void grow_space(struct cpu_space *need, struct job *j, const struct stream *s)
{
	choose_blocks(j, s->num_threads);
	int64_t rows = ceil_div(ceil_div(j->m.count, TILE_ROWS), j->blocks_down) * TILE_ROWS;
	int64_t columns =
	        ceil_div(ceil_div(j->n.count, j->tile->columns), j->blocks_across) * j->tile->columns;
	size_t bytes = (size_t)(rows * columns) * sizeof(float);
	int parts = cpu_parts(s, j->blocks_down * j->blocks_across, 1);
	need->part = bytes > need->part ? bytes : need->part;
	need->parts = parts > need->parts ? parts : need->parts;
}

static struct cpu_space blocked_space(const struct stream *s, const struct matmul *g)
{
	struct job j = job_init(g, tile_best());
	struct packed p = pack_sizes(&j);
	struct cpu_space need = {.shared = packed_bytes(&p)};
	for (int64_t n = 0; n < g->n && !p.wide && g->c_dtype != DT_f32; n += p.n)
		for (int64_t m = 0; m < g->m; m += p.m) {
			j.n = piece(n, p.n, g->n);
			j.m = piece(m, p.m, g->m);
			grow_space(&need, &j, s);
		}
	return need;
}

/* Neither packed parts nor blocks grow evenly with the problem; these are the sizes that none exceeds. */
static struct cpu_space blocked_most(const struct stream *s, const struct matmul *g)
{
	struct job j = job_init(g, tile_best());
	int64_t words = min64(ceil_div(g->k, j.word_elements), MAX_DEPTH);
	int64_t m = round_up(g->m, TILE_ROWS), n = round_up(g->n, j.tile->columns);
	int64_t packed = min64(m * words, MAX_PACKED) + min64(n * words, MAX_PACKED);
	if (g->c_dtype != DT_f32 && words > MAX_DEPTH - DEPTH) /* sums of a part of the depth */
		packed += min64(m, MAX_PACKED / (MAX_DEPTH - DEPTH)) *
		          min64(n, MAX_PACKED / (MAX_DEPTH - DEPTH));
	size_t block = (size_t)(min64(m, BLOCK_ROWS) * min64(n, BLOCK_COLUMNS)) * sizeof(float);
	return (struct cpu_space){.shared = (size_t)packed * sizeof(uint32_t),
	                          .part = g->c_dtype == DT_f32 ? 0 : block,
	                          .parts = g->c_dtype == DT_f32 ? 0 : s->num_threads};
}

static void blocked(struct stream *s, const struct matmul *g)
{
	matmul_blocked_with(s, g, tile_best());
}

const struct matmul_impl *matmul_blocked(void)
{
	static const struct matmul_impl impl = {"own kernels",
	                                        {[DT_f32] = blocked, [DT_bf16] = blocked, [DT_f16] = blocked},
	                                        blocked_space,
	                                        blocked_most};
	return &impl;
}
