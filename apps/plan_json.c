/* pentad plan --json: everything that the plan says, for programs. */
#include "apps/plan.h"
#include "base/json.h"

#include <stdio.h>

static void put_memory(struct buf *b, const struct memory *m)
{
	buf_printf(b, "{\"total\": %lld", (long long)memory_total(m));
	for (int i = 0; i < MEMORY_COUNT; i++)
		buf_printf(b, ", \"%s\": %lld", memory_rows[i].name, (long long)m->bytes[i]);
	buf_puts(b, "}");
}

void plan_put_number(struct buf *b, const char *name, double x)
{
	buf_printf(b, ", \"%s\": ", name);
	json_put_number(b, x);
}

void plan_put_wire(struct buf *b, const double *wire_bytes)
{
	double sum = 0;
	for (int a = 0; a < AXIS_COUNT; a++)
		sum += wire_bytes[a];
	buf_puts(b, "{\"total\": ");
	json_put_number(b, sum);
	for (int a = 0; a < AXIS_COUNT; a++)
		if (AXES_DENSE >> a & 1)
			plan_put_number(b, mesh_axis_name((enum mesh_axis)a), wire_bytes[a]);
	buf_puts(b, "}");
}

void plan_put_layout(struct buf *b, const struct auto_layout *l, int world)
{
	const struct {
		const char *key;
		int64_t size;
	} sizes[] = {{"tensor_model_parallel_size", l->tp},
	             {"context_parallel_size", l->cp},
	             {"pipeline_model_parallel_size", l->pp},
	             {"virtual_pipeline_model_parallel_size", l->chunks},
	             {"expert_model_parallel_size", l->ep},
	             {"expert_tensor_parallel_size", l->etp},
	             {"data_parallel_size", world / (l->tp * l->cp * l->pp)}};
	for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
		buf_printf(b, "\"%s\": %lld, ", sizes[i].key, (long long)sizes[i].size);
	buf_printf(b, "\"sequence_parallel\": %s, \"cp_comm_type\": \"%s\", \"pipeline_schedule\": \"%s\"",
	           l->sequence_parallel ? "true" : "false", parallel_cp_comm_choices[l->exchange].name,
	           parallel_schedule_choices[l->schedule].name);
}

static void put_stage(struct buf *b, const struct estimate_stage *s)
{
	buf_printf(b, "{\"rank\": %d, \"layers\": %lld, \"parameters\": %lld, \"operations\": %zu", s->rank,
	           (long long)s->layers, (long long)s->parameters, s->operations);
	plan_put_number(b, "flops_per_step", s->flop);
	buf_puts(b, ", \"memory_bytes\": ");
	put_memory(b, &s->memory);
	buf_puts(b, ", \"wire_bytes_per_step\": ");
	plan_put_wire(b, s->wire_bytes);
	buf_puts(b, ", \"chunks\": [");
	for (int i = 0; i < s->n_chunk; i++) {
		const struct estimate_chunk *k = &s->chunk[i];
		buf_printf(b, "%s{\"saved_bytes\": %lld, \"in_flight\": %d", i ? ", " : "",
		           (long long)k->saved_bytes, k->in_flight);
		plan_put_number(b, "forward_flops", k->flop.forward);
		plan_put_number(b, "backward_flops", k->flop.backward);
		plan_put_number(b, "weight_flops", k->flop.weight);
		buf_puts(b, "}");
	}
	buf_puts(b, "]}");
}

static void put_alternatives(struct buf *b, const char *name, const struct alternative *list, int n)
{
	bool any = false;
	buf_printf(b, ", \"%s\": [", name);
	for (int i = 0; i < n; i++) {
		if (!list[i].legal)
			continue;
		buf_printf(
		        b,
		        "%s{\"name\": \"%s\", \"chosen\": %s, \"saved_bytes\": %lld, \"total_bytes\": %lld",
		        any ? ", " : "", list[i].name, list[i].is_now ? "true" : "false",
		        (long long)list[i].saved_bytes, (long long)list[i].total_bytes);
		plan_put_number(b, "bubble", list[i].bubble);
		plan_put_number(b, "critical_flops", list[i].flop_critical);
		buf_puts(b, "}");
		any = true;
	}
	buf_puts(b, "]");
}

static void put_assumptions(struct buf *b, const struct plan *p)
{
	plan_put_number(b, "tflops_per_rank", p->machine.rate / 1e12);
	buf_printf(b, ", \"tflops_from\": \"%s\"",
	           p->q->tflops > 0 ? "given" : "matrix products of this machine");
	plan_put_number(b, "seconds_per_step", p->step_s);
	plan_put_number(b, "seconds", plan_run_s(p));
	plan_put_number(b, "node_hours", plan_node_hours(p));
	buf_printf(b,
	           ", \"nodes\": %lld, \"ranks_per_node\": %lld, \"node_bytes\": %lld, "
	           "\"node_limit_bytes\": %lld, \"fits\": %s",
	           (long long)p->nodes, (long long)p->machine.ranks_per_node, (long long)p->node_bytes,
	           (long long)p->machine.node_bytes, p->fits ? "true" : "false");
}

void plan_print_json(const struct plan *p)
{
	const struct estimate *x = &p->x;
	struct buf b = {0};
	buf_printf(&b, "{\"parameters\": %lld, \"world_size\": %lld", (long long)x->parameters,
	           (long long)p->c.derived.world_size);
	buf_puts(&b, ", \"parallel\": {");
	struct auto_layout layout = auto_layout_of(&p->c);
	plan_put_layout(&b, &layout, p->machine.world);
	buf_puts(&b, "}");
	plan_put_number(&b, "flops_per_step", x->flop_per_step);
	buf_printf(&b, ", \"checkpoint_bytes\": %lld", (long long)x->checkpoint_bytes);
	plan_put_number(&b, "bubble", x->bubble);
	plan_put_number(&b, "critical_flops", x->flop_critical);
	buf_printf(&b, ", \"most_loaded_stage\": %d, \"memory_bytes\": ", x->most_loaded);
	put_memory(&b, &x->stage[x->most_loaded].memory);
	buf_puts(&b, ", \"stages\": [");
	for (int s = 0; s < x->n_stage; s++) {
		buf_puts(&b, s ? ", " : "");
		put_stage(&b, &x->stage[s]);
	}
	buf_puts(&b, "]");
	put_alternatives(&b, "schedules", p->schedule, p->n_schedule);
	put_alternatives(&b, "recompute", p->recompute, p->n_recompute);
	put_assumptions(&b, p);
	buf_puts(&b, "}");
	puts(b.data);
	buf_free(&b);
}
