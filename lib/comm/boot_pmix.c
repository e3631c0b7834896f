/* Bootstrap by PMIx (pmix-standard.github.io): under srun --mpi=pmix and under `pentad launch`.
 *
 * Fences always collect: under Slurm a fence that does not is no barrier across nodes. No events are waited
 * for, none are sent (PMIx_Notify_event kills the step). */
#include "comm/boot_method.h"
#include "base/err.h"
#include "base/log.h"
#include "base/mem.h"

#include <pmix.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool pmix_present(void)
{
	return getenv("PMIX_NAMESPACE") && getenv("PMIX_RANK");
}

static void proc_of(const struct boot *b, pmix_rank_t rank, pmix_proc_t *out)
{
	PMIX_LOAD_PROCID(out, b->name_space, rank);
}

static int pmix_size(struct boot *b, struct err *e)
{
	pmix_proc_t all;
	pmix_value_t *v = NULL;
	proc_of(b, PMIX_RANK_WILDCARD, &all);
	pmix_status_t rc = PMIx_Get(&all, PMIX_JOB_SIZE, NULL, 0, &v);
	if (rc != PMIX_SUCCESS || v->type != PMIX_UINT32 || !v->data.uint32 || v->data.uint32 > 1 << 24)
		return err_set(e, EXIT_UNAVAILABLE, "PMIx does not tell the number of ranks: %s",
		               PMIx_Error_string(rc));
	b->size = (int)v->data.uint32;
	PMIX_VALUE_RELEASE(v);
	return 0;
}

/* The node's name as the resource manager knows it; several "nodes" may share one machine. */
static void pmix_host(struct boot *b, const pmix_proc_t *me)
{
	pmix_value_t *v = NULL;
	if (PMIx_Get(me, PMIX_HOSTNAME, NULL, 0, &v) != PMIX_SUCCESS)
		return;
	if (v->type == PMIX_STRING && v->data.string)
		snprintf(b->host_name, sizeof b->host_name, "%s", v->data.string);
	PMIX_VALUE_RELEASE(v);
}

static int pmix_join(struct boot *b, struct err *e)
{
	pmix_proc_t me;
	boot_guard_begin(b, "PMIx_Init");
	pmix_status_t rc = PMIx_Init(&me, NULL, 0);
	boot_guard_end();
	if (rc != PMIX_SUCCESS)
		return err_set(e, EXIT_UNAVAILABLE, "PMIx does not answer (%s)", PMIx_Error_string(rc));
	snprintf(b->name_space, sizeof b->name_space, "%s", me.nspace);
	b->rank = (int)me.rank;
	int failed = pmix_size(b, e);
	if (failed)
		return failed;
	pmix_host(b, &me);
	return 0;
}

static int pmix_publish(struct boot *b, const char *key, const void *data, size_t bytes, struct err *e)
{
	pmix_value_t v = {.type = PMIX_BYTE_OBJECT};
	v.data.bo.bytes = (char *)(uintptr_t)data;
	v.data.bo.size = bytes;
	boot_guard_begin(b, "PMIx_Commit");
	pmix_status_t rc = PMIx_Put(PMIX_GLOBAL, key, &v);
	if (rc == PMIX_SUCCESS)
		rc = PMIx_Commit();
	boot_guard_end();
	return rc == PMIX_SUCCESS
	               ? 0
	               : err_set(e, EXIT_INTERNAL, "PMIx cannot publish %s: %s", key, PMIx_Error_string(rc));
}

static int pmix_fence(struct boot *b, const char *why, struct err *e)
{
	pmix_proc_t all;
	pmix_info_t collect;
	bool yes = true;
	proc_of(b, PMIX_RANK_WILDCARD, &all);
	PMIX_INFO_LOAD(&collect, PMIX_COLLECT_DATA, &yes, PMIX_BOOL);
	boot_guard_begin(b, why);
	pmix_status_t rc = PMIx_Fence(&all, 1, &collect, 1);
	boot_guard_end();
	PMIX_INFO_DESTRUCT(&collect);
	return rc == PMIX_SUCCESS
	               ? 0
	               : err_set(e, EXIT_INTERNAL, "PMIx_Fence failed at %s: %s", why, PMIx_Error_string(rc));
}

static int pmix_lookup(struct boot *b, int rank, const char *key, void **data, size_t *bytes, struct err *e)
{
	pmix_proc_t who;
	pmix_value_t *v = NULL;
	proc_of(b, (pmix_rank_t)rank, &who);
	boot_guard_begin(b, "PMIx_Get");
	pmix_status_t rc = PMIx_Get(&who, key, NULL, 0, &v);
	boot_guard_end();
	if (rc != PMIX_SUCCESS)
		return err_set(e, EXIT_INTERNAL, "PMIx does not know %s of rank %d: %s", key, rank,
		               PMIx_Error_string(rc));
	int failed = 0;
	if (v->type == PMIX_BYTE_OBJECT) {
		*bytes = v->data.bo.size;
		*data = mem_array(1, *bytes);
		memcpy(*data, v->data.bo.bytes, *bytes);
	} else {
		failed = err_set(e, EXIT_INTERNAL, "PMIx holds %s of rank %d as another type", key, rank);
	}
	PMIX_VALUE_RELEASE(v);
	return failed;
}

static void pmix_leave(struct boot *b)
{
	boot_guard_begin(b, "PMIx_Finalize");
	PMIx_Finalize(NULL, 0);
	boot_guard_end();
}

static void pmix_abort(struct boot *b, int code, const char *message)
{
	boot_guard_begin(b, "PMIx_Abort");
	PMIx_Abort(code, message, NULL, 0);
	boot_guard_end();
}

const struct boot_method boot_pmix = {"pmix",     pmix_present, pmix_join,  pmix_publish,
                                      pmix_fence, pmix_lookup,  pmix_leave, pmix_abort};
