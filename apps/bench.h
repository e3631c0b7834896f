/* The benchmarks of `pentad bench`, a row each: name, what it measures. */
#ifndef PENTAD_APPS_BENCH_H
#define PENTAD_APPS_BENCH_H

#define BENCHMARKS(X)                                                              \
	X(matmul, "the matrix products of a transformer's layers on this machine") \
	X(step, "training steps of a configuration on made-up data: time, pipeline bubble, who waits")

#define BENCH_DECLARE(name, doc) int bench_##name##_main(int argc, char **argv);
BENCHMARKS(BENCH_DECLARE)
#undef BENCH_DECLARE

#endif
