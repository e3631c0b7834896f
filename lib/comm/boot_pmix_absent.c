/* PMIx in a build without it: never chosen; where the environment speaks of it, the lone rank's check of
 * Slurm's variables says what is wrong. */
#include "comm/boot_method.h"
#include "base/err.h"

#include <stdlib.h>

static bool pmix_present(void)
{
	return getenv("PMIX_NAMESPACE") != NULL;
}

static int pmix_join(struct boot *b, struct err *e)
{
	(void)b;
	return err_set(e, EXIT_UNAVAILABLE, "this pentad was built without PMIx (configure --with-pmix)");
}

const struct boot_method boot_pmix = {.name = "pmix", .present = pmix_present, .join = pmix_join};
