/* What a test program may ask of the simulator. The environment says the same from outside:
 * SIMT_SEED, SIMT_TIMEOUT (seconds, 20), SIMT_DEVICES (8), SIMT_MULTIPROCESSORS (3), SIMT_TALK (1: say on
 * stderr why a library call was refused). */
#ifndef SIMT_CONTROL_H
#define SIMT_CONTROL_H

#ifdef __cplusplus
extern "C" {
#endif

/* Starts the draws anew: in which order streams, blocks and threads run. */
void simt_set_seed(unsigned seed);
/* How long nobody may move before the simulator gives up, in place of what the environment says. */
void simt_set_timeout(double seconds);

#ifdef __cplusplus
}
#endif

#endif
