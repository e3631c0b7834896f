/* The debugging tools of a running program (exec.h switches them on). Local. Floor: graph. */
#ifndef PENTAD_GRAPH_INSPECT_H
#define PENTAD_GRAPH_INSPECT_H

#include "graph/exec.h"

struct inspector;
struct inspector *inspector_new(const struct prog *p, const struct backend *backend, struct stream *stream,
                                const struct exec_options *options);
void inspector_free(struct inspector *s);
/* Runs node i's kernel with what is switched on around it; adds its seconds to *seconds. */
int inspector_run(struct inspector *s, kernel_fn *kernel, size_t i, struct tensor *in, struct tensor *out,
                  double *seconds, struct err *e);

#endif
