#include "data/bpe_train_file.h"
#include "base/mem.h"

static void put_special(struct buf *out, int id, struct span content, const char *separator)
{
	buf_printf(out, "    {\n      \"id\": %d,\n      \"content\": ", id);
	json_put_string(out, content.text, content.length_bytes);
	buf_printf(out,
	           ",\n      \"single_word\": false,\n      \"lstrip\": false,\n      \"rstrip\": false,\n"
	           "      \"normalized\": false,\n      \"special\": true\n    }%s\n",
	           separator);
}

static void put_byte_level(struct buf *out, const char *key, const char *add_prefix_space)
{
	buf_printf(out,
	           "  \"%s\": {\n    \"type\": \"ByteLevel\",\n    \"add_prefix_space\": %s,\n"
	           "    \"trim_offsets\": true,\n    \"use_regex\": true\n  },\n",
	           key, add_prefix_space);
}

static void put_merges(struct buf *out, const struct bpe_result *r)
{
	buf_puts(out, r->n_merges ? "    \"merges\": [\n" : "    \"merges\": []\n");
	for (size_t i = 0; i < r->n_merges; i++) {
		struct span left = r->tokens[r->merges[i] >> 32], right = r->tokens[(uint32_t)r->merges[i]];
		buf_puts(out, "      [\n        ");
		json_put_string(out, left.text, left.length_bytes);
		buf_puts(out, ",\n        ");
		json_put_string(out, right.text, right.length_bytes);
		buf_puts(out, i + 1 < r->n_merges ? "\n      ],\n" : "\n      ]\n");
	}
	if (r->n_merges)
		buf_puts(out, "    ]\n");
}

void bpe_result_write(const struct bpe_result *r, struct buf *out)
{
	buf_puts(out, "{\n  \"version\": \"1.0\",\n  \"truncation\": null,\n  \"padding\": null,\n");
	buf_puts(out, r->n_specials ? "  \"added_tokens\": [\n" : "  \"added_tokens\": [],\n");
	for (size_t i = 0; i < r->n_specials; i++)
		put_special(out, (int)i, r->tokens[i], i + 1 < r->n_specials ? "," : "");
	if (r->n_specials)
		buf_puts(out, "  ],\n");
	buf_puts(out, "  \"normalizer\": null,\n");
	put_byte_level(out, "pre_tokenizer", "false");
	buf_puts(out, "  \"post_processor\": null,\n");
	put_byte_level(out, "decoder", "true");
	buf_puts(out,
	         "  \"model\": {\n    \"type\": \"BPE\",\n    \"dropout\": null,\n    \"unk_token\": null,\n"
	         "    \"continuing_subword_prefix\": null,\n    \"end_of_word_suffix\": null,\n"
	         "    \"fuse_unk\": false,\n    \"byte_fallback\": false,\n    \"ignore_merges\": false,\n"
	         "    \"vocab\": {\n");
	for (size_t i = 0; i < r->n_tokens; i++) {
		buf_puts(out, "      ");
		json_put_string(out, r->tokens[i].text, r->tokens[i].length_bytes);
		buf_printf(out, ": %zu%s\n", i, i + 1 < r->n_tokens ? "," : "");
	}
	buf_puts(out, "    },\n");
	put_merges(out, r);
	buf_puts(out, "  }\n}");
}
