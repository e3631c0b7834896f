/* The clock that measures durations: monotonic, of no meaning between processes. Local. Floor: base. */
#ifndef PENTAD_BASE_CLOCK_H
#define PENTAD_BASE_CLOCK_H

/* Seconds since some fixed moment. */
double clock_now_s(void);

#endif
