#include "parallel/config.h"

OPTION_ENUM_DEFINE(parallel_choice, PARALLEL_CHOICES)
OPTION_ENUM_DEFINE(parallel_cp_comm, PARALLEL_CP_COMMS)
OPTION_ENUM_DEFINE(parallel_schedule, PARALLEL_SCHEDULES)
