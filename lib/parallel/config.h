/* How a model is laid over ranks: the values of the configuration's group `parallel`. Floor: parallel.
 *
 * The fields are the rows of parallel/config.def. */
#ifndef PENTAD_PARALLEL_CONFIG_H
#define PENTAD_PARALLEL_CONFIG_H

#include "base/option.h"

#define PARALLEL_CHOICES(X)              \
	X(PARALLEL_GIVEN, "given", NULL) \
	X(PARALLEL_AUTO, "auto", NULL)
OPTION_ENUM_DECLARE(parallel_choice, PARALLEL_CHOICES)

#define PARALLEL_CP_COMMS(X)                          \
	X(PARALLEL_CP_P2P, "p2p", NULL)               \
	X(PARALLEL_CP_ALL_GATHER, "all_gather", NULL) \
	X(PARALLEL_CP_A2A, "a2a", NULL)
OPTION_ENUM_DECLARE(parallel_cp_comm, PARALLEL_CP_COMMS)

#define PARALLEL_SCHEDULES(X)                        \
	X(PARALLEL_1F1B, "1f1b", NULL)               \
	X(PARALLEL_INTERLEAVED, "interleaved", NULL) \
	X(PARALLEL_ZERO_BUBBLE, "zero_bubble", NULL)
OPTION_ENUM_DECLARE(parallel_schedule, PARALLEL_SCHEDULES)

struct parallel_config {
#include "base/option_fields.h"
#include "parallel/config.def"
#include "base/option_end.h"
};

#endif
