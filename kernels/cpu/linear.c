/* Linear layers: products, alone or with what follows them, on operands as they are or rounded to 8 bits. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/linear.h"

/* Operand k of dx and dw that is a gradient: the first. */
static enum fp8_format format_of(bool backward, int k)
{
	return backward && k == 0 ? FP8_E5M2 : FP8_E4M3;
}

static float largest(const struct tensor *t)
{
	int64_t n = tensor_count(t);
	float buffer[CPU_BLOCK], most = 0;
	for (int64_t i = 0; i < n; i += CPU_BLOCK) {
		int64_t some = n - i < CPU_BLOCK ? n - i : CPU_BLOCK;
		const float *x = cpu_read(t, i, some, buffer);
		for (int64_t j = 0; j < some; j++)
			most = fabsf(x[j]) > most ? fabsf(x[j]) : most;
	}
	return most;
}

struct rounding {
	const struct tensor *from;
	uint16_t *to;
	float scale;
	enum fp8_format format;
};

static void round_part(struct stream *s, void *job, int64_t begin, int64_t end, int part)
{
	(void)s, (void)part;
	const struct rounding *r = job;
	for (int64_t i = begin; i < end; i++) {
		float x = (float)cpu_get(r->from, i);
		r->to[i] = bf16_from_f32(fp8_round(x * r->scale, r->format) / r->scale);
	}
}

static struct tensor rounded(struct stream *s, const struct tensor *t, enum fp8_format format, void *memory)
{
	struct rounding r = {t, memory, fp8_scale(largest(t), format), format};
	struct tensor copy = *t;
	cpu_parallel(s, tensor_count(t), CPU_BLOCK, round_part, &r);
	copy.data = memory;
	copy.dtype = DT_bf16;
	return copy;
}

/* Room for both operands, rounded; they are exact in bf16. */
int64_t linear_rounded_bytes(const union op_arg *arg, const struct tensor *in)
{
	return arg->linear.fp8 ? 2 * (tensor_count(&in[0]) + tensor_count(&in[1])) + 64 : 0;
}

void linear_operands(struct stream *s, const union op_arg *arg, bool backward, const struct tensor *in,
                     struct tensor *use, void *memory)
{
	for (int k = 0; k < 2; k++) {
		use[k] = in[k];
		if (arg->linear.fp8)
			use[k] =
			        rounded(s, &in[k], format_of(backward, k),
			                (char *)memory + (k ? (2 * tensor_count(&in[0]) + 63) / 64 * 64 : 0));
	}
}

int cpu_fast_linear_act(struct stream *s, const union op_arg *arg, const struct tensor *in,
                        const struct tensor *out, struct err *e)
{
	union op_arg act = {.activation = {arg->linear.kind}};
	int rc = cpu_fast_linear(s, arg, in, &out[1], e);
	return rc ? rc : cpu_fast_activation(s, &act, &out[1], &out[0], e);
}

int cpu_fast_linear_dx_act(struct stream *s, const union op_arg *arg, const struct tensor *in,
                           const struct tensor *out, struct err *e)
{
	union op_arg act = {.activation = {arg->linear.kind}};
	struct tensor both[2] = {out[0], in[2]};
	int rc = cpu_fast_linear_dx(s, arg, in, out, e);
	return rc ? rc : cpu_fast_activation_bwd(s, &act, both, out, e);
}

int cpu_fast_linear_dw_bias(struct stream *s, const union op_arg *arg, const struct tensor *in,
                            const struct tensor *out, struct err *e)
{
	int rc = cpu_fast_linear_dw(s, arg, in, out, e);
	return rc ? rc : cpu_fast_bias_grad(s, arg, in, &out[1], e);
}

struct cpu_space cpu_space_linear_act(const struct stream *s, const union op_arg *arg,
                                      const struct tensor *in, const struct tensor *out)
{
	return cpu_space_linear(s, arg, in, &out[1]);
}
