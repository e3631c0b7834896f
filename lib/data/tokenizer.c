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
	t->tokens[id].content = t->tokens[id].decoded = content;
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

/* What load_added has read: content → index into t->added, and the ids that the file gives. */
struct added_reader {
	struct string_map seen;
	struct pair_map given; /* (0, id) → index */
	int32_t vocab_size, model_end;
};

static bool same(struct span a, struct span b)
{
	return a.length_bytes == b.length_bytes && !memcmp(a.text, b.text, a.length_bytes);
}

/* The id that the file gives must not be another token's. */
static int check_given_id(const struct tokenizer *t, struct load *l, struct added_reader *r,
                          const struct json *spec, const struct added_token *a)
{
	int32_t id = (int32_t)json_get(spec, "id")->integer;
	struct span content = {a->content, a->length_bytes}, other = {NULL, 0};
	uint64_t *index = pair_map_put(&r->given, pair_key(0, id));
	if (*index != PAIR_NONE)
		other = (struct span){t->added[*index].content, t->added[*index].length_bytes};
	else if (id < r->model_end)
		other = t->tokens[id].content;
	if (other.text && !same(content, other))
		return load_wrong(l, spec, "'%.60s' and '%.60s' have the same id, %d", other.text, a->content,
		                  id);
	*index = (uint64_t)string_map_get(&r->seen, a->content, a->length_bytes);
	return 0;
}

/* Of two entries with the same content the later one holds. */
static int keep_added(struct tokenizer *t, struct load *l, struct added_reader *r, const struct json *spec,
                      struct added_token a)
{
	int32_t *place = string_map_put(&r->seen, a.content, a.length_bytes);
	if (*place < 0) {
		*place = (int32_t)t->n_added;
		a.id = added_id(t, &a, r->vocab_size);
		t->added[t->n_added++] = a;
		t->n_tokens = t->n_tokens <= a.id ? a.id + 1 : t->n_tokens;
		t->tokens[a.id].content = (struct span){a.content, a.length_bytes};
		*string_map_put(&t->ids, a.content, a.length_bytes) = a.id;
	}
	a.id = t->added[*place].id;
	t->added[*place] = a;
	return check_given_id(t, l, r, spec, &a);
}

static int load_added(struct tokenizer *t, struct load *l, const struct json *list)
{
	struct added_reader r = {.vocab_size = (int32_t)t->ids.n, .model_end = t->n_tokens};
	int rc = 0;
	t->added = arena_alloc(&t->arena, list ? list->count : 0, sizeof *t->added);
	for (const struct json *spec = list ? list->child : NULL; !rc && spec; spec = spec->next) {
		struct added_token a = {0};
		rc = load_added_token(l, spec, &a);
		if (!rc && a.length_bytes)
			rc = keep_added(t, l, &r, spec, a);
	}
	string_map_free(&r.seen);
	pair_map_free(&r.given);
	return rc;
}

/* Those that are sought in normalized text are normalized themselves, and are decoded so. */
static int build_matchers(struct tokenizer *t, struct err *e)
{
	struct regex_scratch *regex = regex_scratch_new();
	struct buf buffers[2] = {{0}, {0}};
	int rc = 0;
	for (size_t i = 0; i < t->n_added; i++) {
		const struct added_token *a = &t->added[i];
		struct span pattern = {a->content, a->length_bytes};
		if (a->normalized)
			rc = normalizer_run(t->normalizer, regex, buffers, &pattern, e);
		if (rc)
			break;
		added_matcher_add(a->normalized ? &t->normalized : &t->literal, pattern, a);
		pattern.text = arena_strndup(&t->arena, pattern.text, pattern.length_bytes);
		t->tokens[a->id].decoded = pattern;
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
	    pre_tokenizer_load(l, json_get(root, "pre_tokenizer"), &t->pre_tokenizer))
		return l->e->code;
	if (build_matchers(t, l->e))
		return load_passed_on(l, added, "added_tokens");
	return decoder_load(t, l, json_get(root, "decoder"));
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
