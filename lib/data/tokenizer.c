#include "data/tokenizer.h"
#include "base/err.h"
#include "base/hash.h"
#include "base/sys.h"
#include "data/load.h"
#include "data/regex.h"
#include "data/tokenizer_chain.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static const char kinds_read[] = "byte-level BPE is read (GPT-2, Llama 3, Qwen 2 and the like)";

static bool is_byte_level(const struct json *pre_tokenizer)
{
	const char *type = json_get_string(pre_tokenizer, "type", "");
	const struct json *members = json_get_type(pre_tokenizer, "pretokenizers", JSON_ARRAY);
	for (const struct json *m = members ? members->child : NULL; m; m = m->next)
		if (is_byte_level(m))
			return true;
	return !strcmp(type, "ByteLevel");
}

/* Files of before 2020 leave out model.type. */
static int check_kind(struct load *l, const struct json *root, const struct json **model)
{
	*model = json_get_type(root, "model", JSON_OBJECT);
	if (!*model)
		return load_wrong(l, root, "a tokenizer.json needs \"model\", an object");
	const struct json *type = json_get(*model, "type");
	const char *word = json_get_string(*model, "type", "");
	if (type ? strcmp(word, "BPE") != 0 : !json_get(*model, "merges"))
		return load_wrong(l, type ? type : *model, "model.type '%.60s' is not read; %s", word,
		                  kinds_read);
	if (!is_byte_level(json_get(root, "pre_tokenizer")))
		return load_wrong(l, *model,
		                  "BPE without the pre_tokenizer ByteLevel (SentencePiece) is not read; %s",
		                  kinds_read);
	return 0;
}

static int set_token(struct tokenizer *t, struct load *l, const struct json *at, int32_t id,
                     struct span content)
{
	int32_t *place = string_map_put(&t->ids, content.text, content.length_bytes);
	if (t->tokens[id].content.text)
		return load_wrong(l, at, "'%.60s' and '%.60s' have the same id, %d",
		                  t->tokens[id].content.text, content.text, id);
	t->tokens[id].content = content;
	*place = id;
	return 0;
}

/* Rows for every id of the model, and for the added tokens, which may all be new. */
static int load_vocab(struct tokenizer *t, struct load *l, const struct json *model, size_t n_added)
{
	const struct json *vocab = json_get_type(model, "vocab", JSON_OBJECT);
	int64_t top = -1;
	if (!vocab || !vocab->count)
		return load_wrong(l, vocab ? vocab : model, "model.vocab must be an object with tokens");
	JSON_EACH (v, vocab) {
		if (v->type != JSON_NUMBER || !v->is_integer || v->integer < 0 ||
		    v->integer > TOKENIZER_MAX_ID)
			return load_wrong(l, v, "model.vocab['%.60s'] must be an id, 0 to %" PRId64, v->key,
			                  TOKENIZER_MAX_ID);
		top = v->integer > top ? v->integer : top;
	}
	t->n_tokens = (int32_t)top + 1;
	t->tokens = mem_array((size_t)t->n_tokens + n_added, sizeof *t->tokens);
	JSON_EACH (v, vocab) {
		struct span content = {arena_strndup(&t->arena, v->key, v->key_length), v->key_length};
		if (set_token(t, l, v, (int32_t)v->integer, content))
			return l->e->code;
	}
	return 0;
}

static int load_added_token(struct load *l, const struct json *spec, struct added_token *a)
{
	const struct json *content = NULL, *id = json_get(spec, "id");
	bool special = false;
	if (load_string(l, spec, "content", &content) || load_bool(l, spec, "special", &special))
		return l->e->code;
	if (!content || !id || !id->is_integer || id->integer < 0 || id->integer > TOKENIZER_MAX_ID)
		return load_wrong(l, spec,
		                  "an added token is an object with content, a string, and id, 0 to %" PRId64,
		                  TOKENIZER_MAX_ID);
	a->content = arena_strndup(l->arena, content->string, content->length);
	a->length_bytes = content->length;
	a->normalized = !special;
	int bad = load_bool(l, spec, "single_word", &a->single_word) ||
	          load_bool(l, spec, "lstrip", &a->lstrip) || load_bool(l, spec, "rstrip", &a->rstrip) ||
	          load_bool(l, spec, "normalized", &a->normalized);
	return bad ? l->e->code : 0;
}

/* Hugging Face numbers added tokens anew: the model's id where it has the token, else one above the largest
 * id of an added token, or the size of the model's vocabulary. The file's ids agree, unless it has gaps. */
static int32_t added_id(const struct tokenizer *t, const struct added_token *a, int32_t vocab_size)
{
	int32_t id = string_map_get(&t->ids, a->content, a->length_bytes), top = -1;
	for (size_t i = 0; id < 0 && i < t->n_added; i++)
		top = t->added[i].id > top ? t->added[i].id : top;
	return id >= 0 ? id : top >= vocab_size ? top + 1 : vocab_size;
}

static int load_added(struct tokenizer *t, struct load *l, const struct json *list)
{
	struct string_map seen = {0};
	int32_t vocab_size = (int32_t)t->ids.n;
	int rc = 0;
	t->added = arena_alloc(&t->arena, list ? list->count : 0, sizeof *t->added);
	for (const struct json *spec = list ? list->child : NULL; spec; spec = spec->next) {
		struct added_token *a = &t->added[t->n_added];
		if ((rc = load_added_token(l, spec, a)))
			break;
		int32_t *place = string_map_put(&seen, a->content, a->length_bytes);
		if (!a->length_bytes || *place >= 0)
			continue;
		*place = a->id = added_id(t, a, vocab_size);
		t->n_added++;
		if (t->n_tokens <= a->id)
			t->n_tokens = a->id + 1;
		t->tokens[a->id].content = (struct span){a->content, a->length_bytes};
		*string_map_put(&t->ids, a->content, a->length_bytes) = a->id;
	}
	string_map_free(&seen);
	return rc;
}

/* Those that are sought in normalized text are normalized themselves. */
static int build_matchers(struct tokenizer *t, struct err *e)
{
	struct regex_scratch *regex = regex_scratch_new();
	struct buf buffers[2] = {{0}, {0}};
	int rc = 0;
	for (size_t i = 0; !rc && i < t->n_added; i++) {
		const struct added_token *a = &t->added[i];
		struct span pattern = {a->content, a->length_bytes};
		if (a->normalized)
			rc = normalizer_run(t->normalizer, regex, buffers, &pattern, e);
		if (!rc)
			added_matcher_add(a->normalized ? &t->normalized : &t->literal, pattern, a);
	}
	regex_scratch_free(regex);
	buf_free(&buffers[0]);
	buf_free(&buffers[1]);
	return rc;
}

static int load_parts(struct tokenizer *t, struct load *l, const struct json *root)
{
	const struct json *model, *added = json_get(root, "added_tokens");
	if (check_kind(l, root, &model))
		return l->e->code;
	if (added && added->type != JSON_ARRAY && added->type != JSON_NULL)
		return load_wrong(l, added, "added_tokens must be an array");
	if (load_vocab(t, l, model, added ? added->count : 0) || bpe_load(&t->model, l, model, &t->ids) ||
	    load_added(t, l, added) || normalizer_load(l, json_get(root, "normalizer"), &t->normalizer) ||
	    pre_tokenizer_load(l, json_get(root, "pre_tokenizer"), &t->pre_tokenizer) ||
	    decoder_load(t, l, json_get(root, "decoder")))
		return l->e->code;
	return build_matchers(t, l->e) ? load_passed_on(l, added, "added_tokens") : 0;
}

int tokenizer_parse(const char *name, const char *json, size_t length_bytes, struct tokenizer **out,
                    struct err *e)
{
	struct arena tree = {0};
	struct json *root;
	struct tokenizer *t = mem_array(1, sizeof *t);
	struct load l = {name, json, length_bytes, &t->arena, e};
	t->name = mem_strdup(name);
	t->hash = hash_bytes(json, length_bytes, 0);
	int rc = json_parse(&tree, name, json, length_bytes, &root, e);
	if (!rc)
		rc = load_parts(t, &l, root);
	arena_free(&tree);
	if (rc)
		tokenizer_free(t);
	else
		*out = t;
	return rc;
}

int tokenizer_load(const char *path, struct tokenizer **out, struct err *e)
{
	char *data;
	size_t bytes;
	int rc = sys_read_file(path, TOKENIZER_MAX_FILE, &data, &bytes, e);
	if (rc)
		return rc;
	rc = tokenizer_parse(path, data, bytes, out, e);
	free(data);
	return rc;
}

void tokenizer_free(struct tokenizer *t)
{
	if (!t)
		return;
	normalizer_free(t->normalizer);
	pre_tokenizer_free(t->pre_tokenizer);
	bpe_free(&t->model);
	added_matcher_free(&t->literal);
	added_matcher_free(&t->normalized);
	string_map_free(&t->ids);
	free(t->tokens);
	free(t->name);
	arena_free(&t->arena);
	free(t);
}

int32_t tokenizer_vocab_size(const struct tokenizer *t)
{
	return t->n_tokens;
}

int32_t tokenizer_id(const struct tokenizer *t, const char *content)
{
	return string_map_get(&t->ids, content, strlen(content));
}

const char *tokenizer_content(const struct tokenizer *t, int32_t id)
{
	return id >= 0 && id < t->n_tokens ? t->tokens[id].content.text : NULL;
}

int32_t tokenizer_eod(const struct tokenizer *t)
{
	static const char *const names[] = {
	        "<|endoftext|>", "<|end_of_text|>",       "</s>", "<|eot_id|>", "<eos>",
	        "<|im_end|>",    "<｜end▁of▁sentence｜>", "[SEP]"};
	int32_t id = -1;
	for (size_t i = 0; id < 0 && i < sizeof names / sizeof *names; i++)
		id = tokenizer_id(t, names[i]);
	return id;
}

const char *tokenizer_path(const struct tokenizer *t)
{
	return t->name;
}

uint64_t tokenizer_hash(const struct tokenizer *t)
{
	return t->hash;
}
