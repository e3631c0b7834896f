/* What a program costs, its fingerprint, and its listing. */
#include "base/hash.h"
#include "graph/rule.h"

#include <string.h>

struct cost prog_cost(const struct prog *p, enum segment segment)
{
	struct cost sum = {0};
	for (size_t i = 0; i < p->n_node; i++) {
		if (p->node[i].segment != segment)
			continue;
		struct cost c = rules[p->node[i].op]->cost(p, &p->node[i]);
		sum.flop += c.flop;
		sum.bytes += c.bytes;
		for (int a = 0; a < AXIS_COUNT; a++)
			sum.wire_bytes[a] += c.wire_bytes[a];
	}
	return sum;
}

uint64_t prog_hash(const struct prog *p)
{
	uint64_t h = 0;
	for (size_t i = 0; i < p->n_node; i++) {
		const struct node *n = &p->node[i];
		h = hash_bytes(&n->op, 1, h + n->segment);
		h = hash_bytes(n->in, sizeof n->in, h);
		for (int k = 0; k < op_rows[n->op].n_out; k++) {
			h = hash_bytes(OUT(k)->dim, sizeof OUT(k)->dim, h + OUT(k)->dtype);
			h = hash_bytes(OUT(k)->place, sizeof OUT(k)->place, h);
		}
	}
	return h;
}

static void print_value(const struct prog *p, int32_t id, struct buf *out)
{
	const struct value *v = &p->value[id];
	buf_printf(out, " v%d%s%.24s:%s[", id, v->region <= R_STATE ? " " : "",
	           v->region <= R_STATE ? v->name : "", dtype_rows[v->dtype].name);
	for (int k = 0; k < v->nd; k++)
		buf_printf(out, "%s%d", k ? "," : "", v->dim[k]);
	buf_printf(out, "]@%s+%lld", region_names[v->region], (long long)v->offset_bytes);
	for (int a = 0; a < AXIS_COUNT; a++)
		if (p->axis_size[a] > 1 && prog_lies_along(v, a))
			buf_printf(out, " %s:%s", mesh_axis_name((enum mesh_axis)a),
			           place_names[v->place[a]]);
}

void prog_print(const struct prog *p, struct buf *out)
{
	for (size_t i = 0; i < p->n_node; i++) {
		const struct node *n = &p->node[i];
		const char *slash = strrchr(n->where, '/');
		buf_printf(out, "%5zu %-6s", i, segment_names[n->segment]);
		buf_printf(out, n->layer < 0 ? "  -  " : "L%-4d", n->layer);
		buf_printf(out, "%-18s", op_rows[n->op].name);
		for (int k = 0; k < op_rows[n->op].n_out; k++)
			print_value(p, n->out[k], out);
		buf_puts(out, " <-");
		for (int k = 0; k < op_rows[n->op].n_in; k++)
			if (HAS(k))
				buf_printf(out, " v%d", n->in[k]);
		buf_printf(out, "  (%s)\n", slash ? slash + 1 : n->where);
	}
	for (int r = 0; r < R_COUNT; r++)
		buf_printf(out, "%-6s %14lld bytes\n", region_names[r], (long long)p->bytes[r]);
}
