/* What a layout costs, known before anything runs: memory of a rank of every pipeline stage, operations, idle
 * time, traffic. The programs are those that a run executes, so bytes and operations are exact; seconds are
 * operations divided by a rate. Needs no other rank. Local. Floor: train. */
#ifndef PENTAD_TRAIN_ESTIMATE_H
#define PENTAD_TRAIN_ESTIMATE_H

#include "backend/backend.h"
#include "train/program.h"

struct step;

/* Memory of a rank: the regions of its training program, then what it holds besides; all but the process is
 * exact. */
#define MEMORY_EXTRAS(X)                                                    \
	X(validation, "what the validation program adds to the weights")    \
	X(workspace, "of kernels, beside their tensors")                    \
	X(communication, "of reductions, beside their tensors")             \
	X(rounding, "large blocks are whole huge pages")                    \
	X(staging, "the largest tensor on its way to or from a checkpoint") \
	X(process, "the program, its libraries and what these keep: about")
enum memory_kind {
	MEMORY_LAST_REGION = R_COUNT - 1, /* up to it: enum region */
#define MEMORY_KIND(name, doc) MEMORY_##name,
	MEMORY_EXTRAS(MEMORY_KIND)
#undef MEMORY_KIND
	        MEMORY_COUNT
};
struct memory {
	int64_t bytes[MEMORY_COUNT];
	bool on_device; /* of a device, not of the host: no process, no buffers of communicators */
};
struct memory_row {
	const char *name, *doc;
};
extern const struct memory_row memory_rows[MEMORY_COUNT];
int64_t memory_total(const struct memory *m);

/* What rank `rank` of a checked configuration will hold, on this host. A dry run
 * validates and saves nothing. */
int estimate_memory(struct memory *m, const struct config *c, int rank, struct rank_on_host host,
                    bool dry_run, struct err *e);
/* Whether a rank that has made a step holds what was planned, no more and no less: else EXIT_INTERNAL with
 * both. `evaluation`: its exec is NULL where nothing is validated. */
int memory_check(const struct memory *planned, const struct step *training, const struct step *evaluation,
                 struct err *e);

struct estimate_chunk {      /* a virtual stage */
	int64_t saved_bytes; /* activations of a micro-batch */
	int32_t in_flight;   /* micro-batches at once */
	double edge_bytes;   /* that go to the next or the former stage at once */
	struct schedule_times flop;
};

/* What a rank sends over one group: in a slot of the chunk (segments FWD, BWD, WGRAD), or once a step. */
struct estimate_traffic {
	uint32_t axes; /* bit set of enum mesh_axis, or AXES_ENDS */
	uint8_t segment, chunk;
	bool pairwise; /* each rank of the group gets a part of its own; else around a ring */
	bool beside;   /* it runs beside work */
	double bytes, calls;
	double flop; /* of that work */
};

struct estimate_stage {             /* of each rank of a pipeline stage: they are alike */
	int rank;                   /* the first of them */
	int64_t layers, parameters; /* that it holds */
	size_t operations;          /* in its program */
	struct memory memory;
	int n_chunk;
	struct estimate_chunk chunk[PROG_MAX_CHUNKS];
	double flop_at_end;               /* of reduction, norm and update, once a step */
	double flop;                      /* of a step */
	double wire_bytes[AXIS_COUNT];    /* sent in a step */
	struct estimate_traffic *traffic; /* the same without edges, by group and slot */
	size_t n_traffic, cap_traffic;
};

struct estimate {
	int n_stage;
	struct estimate_stage *stage;
	struct schedule_spec schedule;
	int edge_slots;           /* buffers of each direction between stages */
	int64_t parameters;       /* of the whole model, padding of the vocabulary among them */
	int64_t checkpoint_bytes; /* of one step's tensors */
	double flop_per_step;     /* of the model, over all ranks: Megatron-LM's formula */
	double flop_critical; /* what must be done one after the other: seconds of a step times the rate */
	double bubble;        /* idle part of the pipeline's time, averaged over its ranks */
	int most_loaded;      /* the stage whose rank holds most */
};

/* All stages of a checked configuration. estimate_free is due whatever it returns. */
int estimate_layout(struct estimate *x, const struct config *c, int local_ranks, struct err *e);
void estimate_free(struct estimate *x);
/* Bytes of the fullest node, where each holds `ranks` consecutive ranks of the world. */
int64_t estimate_node_bytes(const struct estimate *x, int64_t world_size, int64_t ranks);
/* Bytes of saved activations on the rank that saves most. */
int64_t estimate_saved_bytes(const struct estimate *x);

#endif
