/* Meeting through PMIx: srun --mpi=pmix, or `pentad launch`. What Slurm's plugin does is taken as it is: a
 * fence that does not collect data is no barrier across nodes, events never come, and PMIx_Notify_event
 * kills. */
#include "base/err.h"
#include "base/mem.h"
#include "comm/boot_method.h"

#include <pmix.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static pmix_proc_t me;

static bool pmix_applies(void)
{
	return getenv("PMIX_NAMESPACE") && getenv("PMIX_RANK");
}

static int failed(struct err *e, int code, const char *what, pmix_status_t status)
{
	return err_set(e, code, "%s: PMIx says %s (%d)", what, PMIx_Error_string(status), status);
}

/* A number that the resource manager told about this rank, or about the whole job. */
static long get_number(const char *key, bool of_job, long otherwise)
{
	pmix_proc_t who = me;
	pmix_value_t *v;
	if (of_job)
		who.rank = PMIX_RANK_WILDCARD;
	if (PMIx_Get(&who, key, NULL, 0, &v) != PMIX_SUCCESS)
		return otherwise;
	long n = v->type == PMIX_UINT32   ? (long)v->data.uint32
	         : v->type == PMIX_UINT16 ? (long)v->data.uint16
	         : v->type == PMIX_INT    ? v->data.integer
	                                  : otherwise;
	PMIX_VALUE_RELEASE(v);
	return n;
}

static void get_host(char *out, size_t cap)
{
	pmix_value_t *v;
	gethostname(out, cap - 1);
	if (PMIx_Get(&me, PMIX_HOSTNAME, NULL, 0, &v) != PMIX_SUCCESS)
		return;
	if (v->type == PMIX_STRING && v->data.string)
		snprintf(out, cap, "%s", v->data.string);
	PMIX_VALUE_RELEASE(v);
}

static int pmix_join(struct boot *b, struct err *e)
{
	pmix_status_t status = PMIx_Init(&me, NULL, 0);
	if (status != PMIX_SUCCESS)
		return failed(e, EXIT_UNAVAILABLE, "PMIX_NAMESPACE is set, but nobody answers", status);
	b->rank = (int)me.rank;
	b->size = (int)get_number(PMIX_JOB_SIZE, true, 0);
	if (b->size < 1 || b->rank >= b->size) {
		PMIx_Finalize(NULL, 0);
		return err_set(e, EXIT_UNAVAILABLE, "PMIx gives rank %d of %d", b->rank, b->size);
	}
	b->local_size = (int)get_number(PMIX_LOCAL_SIZE, true, 1);
	b->num_nodes = (int)get_number(PMIX_NUM_NODES, true, 1);
	b->local_rank = (int)get_number(PMIX_LOCAL_RANK, false, 0);
	b->node = (int)get_number(PMIX_NODEID, false, 0);
	get_host(b->host_name, sizeof b->host_name);
	snprintf(b->name_space, sizeof b->name_space, "%s", me.nspace);
	return 0;
}

static int pmix_publish(struct boot *b, const char *key, const void *data, size_t bytes, struct err *e)
{
	(void)b;
	pmix_value_t v;
	PMIX_VALUE_CONSTRUCT(&v);
	v.type = PMIX_BYTE_OBJECT;
	v.data.bo.bytes = (char *)(uintptr_t)data;
	v.data.bo.size = bytes;
	pmix_status_t status = PMIx_Put(PMIX_GLOBAL, key, &v);
	if (status == PMIX_SUCCESS)
		status = PMIx_Commit();
	return status == PMIX_SUCCESS ? 0 : failed(e, EXIT_INTERNAL, "publishing to the other ranks", status);
}

static int pmix_fence(struct boot *b, struct err *e)
{
	(void)b;
	pmix_proc_t all = me;
	pmix_info_t collect;
	bool yes = true;
	all.rank = PMIX_RANK_WILDCARD;
	PMIX_INFO_LOAD(&collect, PMIX_COLLECT_DATA, &yes, PMIX_BOOL);
	pmix_status_t status = PMIx_Fence(&all, 1, &collect, 1);
	PMIX_INFO_DESTRUCT(&collect);
	return status == PMIX_SUCCESS ? 0 : failed(e, EXIT_INTERNAL, "a fence of all ranks", status);
}

static int pmix_fetch(struct boot *b, int rank, const char *key, void **data, size_t *bytes, struct err *e)
{
	(void)b;
	pmix_proc_t who = me;
	pmix_value_t *v;
	who.rank = (pmix_rank_t)rank;
	pmix_status_t status = PMIx_Get(&who, key, NULL, 0, &v);
	if (status != PMIX_SUCCESS)
		return failed(e, EXIT_INTERNAL, "asking for another rank's card", status);
	bool fits = v->type == PMIX_BYTE_OBJECT;
	if (fits) {
		*bytes = v->data.bo.size;
		*data = memcpy(mem_array(*bytes + 1, 1), v->data.bo.bytes, *bytes);
	}
	PMIX_VALUE_RELEASE(v);
	return fits ? 0 : err_set(e, EXIT_INTERNAL, "rank %d published %s in another form", rank, key);
}

static void pmix_leave(struct boot *b)
{
	(void)b;
	PMIx_Finalize(NULL, 0);
}

static void pmix_abort(struct boot *b, int code, const char *message)
{
	(void)b;
	PMIx_Abort(code, message, NULL, 0);
	_exit(code);
}

const struct boot_method boot_pmix = {"pmix",     pmix_applies, pmix_join,  pmix_publish,
                                      pmix_fence, pmix_fetch,   pmix_leave, pmix_abort};
