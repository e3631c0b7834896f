/* pentad convert: a Hugging Face folder into a folder with model.yaml and a checkpoint, and back. */
#include "apps/commands.h"
#include "apps/options.h"
#include "base/err.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/sys.h"
#include "base/text.h"
#include "ckpt/ckpt.h"
#include "model/hf.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const size_t max_shard_bytes = 5000000000;

struct job {
	const char *from;
	char to[PATH_MAX], tmp[PATH_MAX + 32]; /* absolute; `tmp` becomes `to` */
	struct err *e;
};

/* What goes along unchanged. */
static const char *const companions[] = {"tokenizer.json",
                                         "tokenizer_config.json",
                                         "special_tokens_map.json",
                                         "added_tokens.json",
                                         "vocab.json",
                                         "merges.txt",
                                         "tokenizer.model",
                                         "generation_config.json"};
enum { N_COMPANIONS = sizeof companions / sizeof *companions, MAX_COMPANION_BYTES = 1 << 30 };

static int join(struct job *j, char *out, const char *dir, const char *name)
{
	if (snprintf(out, PATH_MAX, "%s/%s", dir, name) < PATH_MAX)
		return 0;
	return err_set(j->e, EXIT_IO, "%s: path too long", dir);
}

static int copy_companions(struct job *j, const char *source)
{
	for (size_t i = 0; i < N_COMPANIONS; i++) {
		char from[PATH_MAX], to[PATH_MAX];
		char *data = NULL;
		size_t bytes = 0;
		if (join(j, from, source, companions[i]) || join(j, to, j->tmp, companions[i]))
			return j->e->code;
		if (access(from, F_OK) != 0)
			continue;
		int rc = sys_read_file(from, MAX_COMPANION_BYTES, &data, &bytes, j->e);
		if (!rc)
			rc = sys_write_file(to, data, bytes, j->e);
		free(data);
		if (rc)
			return rc;
	}
	return 0;
}

static int write_checkpoint(struct job *j, const struct hf *h)
{
	char dir[PATH_MAX];
	return join(j, dir, j->tmp, "checkpoints") ? j->e->code : hf_import(h, dir, j->e);
}

/* A string of JSON is one of YAML. */
static void put_path(struct buf *b, const char *dir, const char *name)
{
	struct buf path = {0};
	buf_puts(&path, dir);
	if (name)
		buf_printf(&path, "/%s", name);
	json_put_string(b, path.data, path.length);
	buf_free(&path);
}

static int write_yaml(struct job *j, const struct hf *h)
{
	struct buf b = {0};
	char path[PATH_MAX];
	buf_printf(&b,
	           "# A %s model, converted from Hugging Face. `pentad train -c FILE -c YOURS` goes on from "
	           "its\n"
	           "# weights: lay run, dataset, train and optimizer over this in a file of yours.\n"
	           "model:\n",
	           hf_family_name(hf_family_of(h)));
	hf_model_put_yaml(hf_model(h), &b);
	if (join(j, path, j->tmp, "tokenizer.json") == 0 && access(path, F_OK) == 0) {
		buf_puts(&b, "tokenizer:\n  tokenizer_model: ");
		put_path(&b, j->to, "tokenizer.json");
		buf_puts(&b, "\n");
	}
	buf_puts(&b, "checkpoint:\n  pretrained_checkpoint: ");
	put_path(&b, j->to, NULL);
	buf_puts(&b, "\n  finetune: true\n");
	int rc = join(j, path, j->tmp, "model.yaml");
	if (!rc)
		rc = sys_write_file(path, b.data, b.length, j->e);
	buf_free(&b);
	return rc;
}

static int to_pentad(struct job *j)
{
	struct hf *h = NULL;
	int rc = hf_open(j->from, &h, j->e);
	if (!rc)
		rc = copy_companions(j, j->from);
	if (!rc)
		rc = write_checkpoint(j, h);
	if (!rc)
		rc = write_yaml(j, h);
	hf_close(h);
	return rc;
}

/* checkpoint -> HF */

/* The folder that `convert` or a run made: FOLDER/checkpoints/step-… */
static void cut_to_folder(char *path)
{
	char *step = strrchr(path, '/');
	if (!step)
		return;
	*step = 0;
	char *checkpoints = strrchr(path, '/');
	if (checkpoints && !strcmp(checkpoints, "/checkpoints"))
		*checkpoints = 0;
}

static int to_hf(struct job *j)
{
	char source[PATH_MAX] = "";
	struct ckpt *c = NULL;
	int rc = ckpt_open(j->from, CKPT_NEWEST, 0, &c, j->e);
	if (!rc)
		rc = hf_export(c, j->tmp, max_shard_bytes, j->e);
	if (!rc && !realpath(ckpt_path(c), source))
		rc = err_errno(j->e, EXIT_IO, "%s", ckpt_path(c));
	cut_to_folder(source);
	if (!rc)
		rc = copy_companions(j, source);
	ckpt_close(c);
	return rc;
}

/* The folder that is made */

static bool is_empty(const char *path)
{
	DIR *d = opendir(path);
	int n = 0;
	if (!d)
		return false;
	while (readdir(d))
		n++;
	closedir(d);
	return n <= 2; /* . and .. */
}

/* `to` becomes absolute: its folder must be there, it itself not, unless empty. */
static int begin(struct job *j, const char *to)
{
	char copy[PATH_MAX], parent[PATH_MAX];
	size_t n = strlen(to);
	if (!n || n >= sizeof copy)
		return err_set(j->e, EXIT_USAGE, "convert: '%.80s' is no path", to);
	memcpy(copy, to, n + 1);
	while (n > 1 && copy[n - 1] == '/')
		copy[--n] = 0;
	char *slash = strrchr(copy, '/');
	const char *base = slash ? slash + 1 : copy;
	if (slash)
		*slash = 0;
	const char *above = !slash ? "." : slash == copy ? "/" : copy;
	if (!realpath(above, parent))
		return err_errno(j->e, EXIT_NO_INPUT, "%s", above);
	if (join(j, j->to, parent, base))
		return j->e->code;
	struct stat st;
	if (sys.stat(j->to, &st) == 0 && !is_empty(j->to))
		return err_set(j->e, EXIT_IO, "%s: is there already; give a folder that is not, or is empty",
		               j->to);
	snprintf(j->tmp, sizeof j->tmp, "%s.tmp.%d", j->to, (int)getpid());
	if (sys.mkdir(j->tmp, 0777) != 0)
		return err_errno(j->e, EXIT_IO, "%s: cannot create folder", j->tmp);
	return 0;
}

static int finish(struct job *j)
{
	char parent[PATH_MAX];
	if (sys_sync_dir(j->tmp, j->e))
		return j->e->code;
	if (sys.rename(j->tmp, j->to) != 0) /* also over an empty folder */
		return err_errno(j->e, EXIT_IO, "%s: cannot be renamed to %s", j->tmp, j->to);
	snprintf(parent, sizeof parent, "%s", j->to);
	char *slash = strrchr(parent, '/');
	slash[slash == parent] = 0;
	return sys_sync_dir(parent, j->e);
}

static int convert(const char *from, const char *to, bool into_hf, struct err *e)
{
	struct job j = {.from = from, .e = e};
	int rc = begin(&j, to);
	if (rc)
		return rc;
	rc = into_hf ? to_hf(&j) : to_pentad(&j);
	if (!rc)
		rc = finish(&j);
	if (rc) {
		struct err second = {0};
		sys_remove_tree(j.tmp, &second);
		return rc;
	}
	printf("%s: %s\n", j.to,
	       into_hf ? "config.json and model.safetensors" : "model.yaml and checkpoints/step-00000000");
	return 0;
}

/* 0, or EXIT_USAGE: the format is the other one unless it is given. */
static int choose(const char *from, const char *format, bool *into_hf, struct err *e)
{
	bool is_hf = hf_is_folder(from);
	*into_hf = format ? !strcmp(format, "hf") : !is_hf;
	if (format && strcmp(format, "hf") && strcmp(format, "pentad"))
		return err_set(e, EXIT_USAGE, "--format is hf or pentad, not %s", format);
	if (*into_hf == is_hf && is_hf)
		return err_set(e, EXIT_USAGE, "%s is a Hugging Face folder already", from);
	return 0;
}

#define FAMILY_WORD(id, type, class) " " type

int convert_main(int argc, char **argv)
{
	const char *format = NULL;
	struct cli_option options[] = {
	        {"format", CLI_STRING, &format, "hf|pentad", "what TO becomes; default: what FROM is not"},
	};
	struct cli cli = {
	        .usage = "convert FROM TO [--format hf|pentad]",
	        .doc = "Turns a Hugging Face folder (safetensors; one of" HF_FAMILIES(
	                FAMILY_WORD) ") into model.yaml and a checkpoint, and a run or step back.",
	        .example = "convert Llama-3.2-1B models/llama",
	        .options = options,
	        .n = sizeof options / sizeof *options,
	        .max_words = 2,
	};
	int code;
	struct err e = {0};
	bool into_hf;
	if (!cli_parse(&cli, argc, argv, &code))
		return code;
	if (cli.words.n != 2)
		code = err_set(&e, EXIT_USAGE, "FROM and TO belong here; example: pentad %s", cli.example);
	else if (!(code = choose(cli.words.items[0], format, &into_hf, &e)))
		code = convert(cli.words.items[0], cli.words.items[1], into_hf, &e);
	if (code)
		log_error("convert: %s", e.text);
	cli_free(&cli);
	return code;
}
