/* Every collective and message of comm/comm.h against a serial computation, for ranks of any transport. */
#ifndef PENTAD_TEST_COMM_SUITE_H
#define PENTAD_TEST_COMM_SUITE_H

struct comm;

/* All of it, at sizes 0, 1, 7, 1000 and 100003, for every element type and reduction. Collective over world.
 */
void comm_suite(struct comm *world);

#endif
