/* The wrapper that compares: before a collective runs, every rank of the group shows the others which one it
 * is about to call. For tests and for the hunt after a hang; it costs a small exchange a call. */
#include "comm/link.h"
#include "base/err.h"
#include "base/hash.h"
#include "base/mem.h"

#include <stdlib.h>
#include <string.h>

/* What must agree, all of it i64. */
enum { SIGN_KIND, SIGN_COUNT, SIGN_DTYPE, SIGN_OP, SIGN_ROOT, SIGN_PARTS, SIGN_FIELDS };

static int64_t parts_hash(const struct comm *c, const size_t *counts)
{
	return counts ? (int64_t)hash_bytes(counts, c->size * sizeof *counts, 1) : 0;
}

/* The parts of an all_to_all differ between ranks by right: they are compared in pairs. */
static void sign(const struct comm *c, const struct comm_call *call, int64_t *s)
{
	const size_t *counts = call->kind == COMM_all_to_all ? NULL
	                       : call->send_counts           ? call->send_counts
	                                                     : call->recv_counts;
	s[SIGN_KIND] = call->kind;
	s[SIGN_COUNT] = (int64_t)call->count;
	s[SIGN_DTYPE] = call->dtype;
	s[SIGN_OP] = call->op;
	s[SIGN_ROOT] = call->root;
	s[SIGN_PARTS] = parts_hash(c, counts);
}

static void put_sign(struct buf *b, const int64_t *s)
{
	bool reduces = s[SIGN_KIND] == COMM_all_reduce || s[SIGN_KIND] == COMM_reduce_scatter;
	buf_puts(b, comm_kind_name[s[SIGN_KIND]]);
	if (s[SIGN_KIND] == COMM_barrier)
		return;
	if (s[SIGN_PARTS])
		buf_printf(b, " of uneven parts (hash %08x) of", (unsigned)s[SIGN_PARTS]);
	else
		buf_printf(b, " of %lld", (long long)s[SIGN_COUNT]);
	buf_printf(b, " %s", dtype_rows[s[SIGN_DTYPE]].name);
	if (reduces)
		buf_printf(b, " %s", reduction_name[s[SIGN_OP]]);
	if (s[SIGN_KIND] == COMM_broadcast)
		buf_printf(b, " from %lld", (long long)s[SIGN_ROOT]);
}

/* Every rank finds the same and says the same. */
static int compare(struct comm *c, int64_t (*all)[SIGN_FIELDS], struct err *e)
{
	struct buf b = {0};
	int differ = 0;
	for (int i = 1; i < c->size; i++)
		if (memcmp(all[i], all[0], sizeof all[i])) {
			if (differ++ > 3)
				continue;
			buf_printf(&b, ", rank %d calls ", c->world_rank[i]);
			put_sign(&b, all[i]);
		}
	if (differ) {
		struct buf first = {0};
		put_sign(&first, all[0]);
		err_set(e, EXIT_INTERNAL,
		        "group %s, call #%llu: rank %d calls %s%s; %d of %d ranks differ from the first: all "
		        "ranks of a group must make the same calls",
		        c->name, (unsigned long long)c->sequence, c->world_rank[0], first.data, b.data,
		        differ, c->size);
		buf_free(&first);
	}
	buf_free(&b);
	return differ ? EXIT_INTERNAL : 0;
}

static int check_pairs(struct comm *c, const struct comm_call *call, int64_t *told, struct err *e)
{
	int64_t *mine = told + c->size;
	struct comm_call tell = {COMM_all_to_all, mine, told, 1, .dtype = DT_i64};
	for (int i = 0; i < c->size; i++)
		mine[i] = (int64_t)call->send_counts[i];
	int rc = c->inner_ops->run[COMM_all_to_all](c, &tell, e);
	for (int i = 0; i < c->size && !rc; i++)
		if (told[i] != (int64_t)call->recv_counts[i])
			rc = err_set(
			        e, EXIT_INTERNAL,
			        "group %s, call #%llu: in all_to_all rank %d sends %lld elements to rank %d, "
			        "which expects %zu",
			        c->name, (unsigned long long)c->sequence, c->world_rank[i],
			        (long long)told[i], c->link->rank, call->recv_counts[i]);
	return rc;
}

static int run_checked(struct comm *c, const struct comm_call *call, struct err *e)
{
	int64_t(*all)[SIGN_FIELDS] = mem_array(c->size, sizeof *all);
	int64_t *pairs = mem_array(2 * (size_t)c->size, sizeof *pairs), mine[SIGN_FIELDS];
	sign(c, call, mine);
	struct comm_call show = {COMM_all_gather, mine, all, SIGN_FIELDS, .dtype = DT_i64};
	int rc = c->inner_ops->run[COMM_all_gather](c, &show, e);
	rc = rc ? rc : compare(c, all, e);
	if (!rc && call->kind == COMM_all_to_all && call->send_counts)
		rc = check_pairs(c, call, pairs, e);
	free(all);
	free(pairs);
	return rc ? rc : c->inner_ops->run[call->kind](c, call, e);
}

const struct comm_ops comm_checked = {
        .name = "checked",
        .run =
                {
#define COMM_KIND_ROW(name) [COMM_##name] = run_checked,
                        COMM_KINDS(COMM_KIND_ROW)
#undef COMM_KIND_ROW
                },
};
