/* safetensors files, good and bad, and Hugging Face folders: in, and out again byte for byte. */
#include "base/err.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/rng.h"
#include "base/sys.h"
#include "ckpt/ckpt.h"
#include "model/hf.h"
#include "test/test.h"

#include <stdlib.h>

/* Lives as long as the program. */
static const char *inside(const char *dir, const char *name)
{
	static struct arena paths;
	return arena_printf(&paths, "%s/%s", dir, name);
}

/* Writes size, header and `data_bytes` bytes of data; the path is returned. */
static const char *put_file(const char *dir, const char *name, const char *header, size_t header_bytes,
                            uint64_t announced, size_t data_bytes)
{
	struct buf b = {0};
	struct err e = {0};
	const char *path = inside(dir, name);
	for (int i = 0; i < 8; i++)
		buf_printf(&b, "%c", 'x');
	for (int i = 0; i < 8; i++)
		b.data[i] = (char)(announced >> 8 * i);
	buf_add(&b, header, header_bytes);
	for (size_t i = 0; i < data_bytes; i++)
		buf_add(&b, &"abcdefg"[i % 7], 1);
	CHECK_INT(sys_write_file(path, b.data, b.length, &e), 0);
	buf_free(&b);
	return path;
}

#define A "\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}"
#define B "\"b\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[8,16]}"

TEST(reads_what_is_right)
{
	struct err e = {0};
	struct st_file *f = NULL;
	const char text[] = "{\"__metadata__\":{\"format\":\"pt\"}," B "," A "}   ";
	const char *path =
	        put_file(test_dir(), "good.safetensors", text, sizeof text - 1, sizeof text - 1, 16);
	MUST(st_open(path, &f, &e) == 0);
	CHECK_INT(st_count(f), 2);
	const struct st_tensor *a = st_find(f, "a"), *b = st_find(f, "b");
	MUST(a && b);
	CHECK_INT(a->dtype, ST_F32);
	CHECK_INT(b->nd, 0);
	char got[8] = "";
	CHECK_INT(st_read(f, b, 1, 6, got, &e), 0);
	CHECK_STR(got, "cdefga");
	CHECK_INT(st_read(f, b, 1, 8, got, &e), EXIT_INTERNAL);
	CHECK(st_find(f, "c") == NULL);
	st_close(f);
}

TEST(refuses_what_is_wrong)
{
	static const struct {
		const char *header;
		int data_bytes;
		const char *says;
	} cases[] = {
	        {"{" A "," B "}", 15, "reach out of the file"},
	        {"{" A "," B "}", 17, "its tensors end at"},
	        {"{" A "," A "}", 8, "a key that was there before"},
	        {"{" A "} x", 8, "after the end"},
	        {"[" A "]", 8, "not that of a safetensors"},
	        {" {" A "}", 8, "not that of a safetensors"},
	        {"{" A, 8, "JSON"},
	        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12, "leaves a hole"},
	        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}", 12, "overlaps"},
	        {"{" A ",\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "overlaps"},
	        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, "reach out"},
	        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", 8, "reach out"},
	        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,9223372036854775807]}}", 8,
	         "reach out"},
	        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8.0]}}", 8, "two integers"},
	        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", 8, "two integers"},
	        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", 8, "not as far apart"},
	        {"{\"a\":{\"dtype\":\"F64\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "not as far apart"},
	        {"{\"a\":{\"dtype\":\"F99\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "unknown"},
	        {"{\"a\":{\"dtype\":7,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, "unknown"},
	        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8, "no count"},
	        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],\"data_offsets\":[0,0]}}", 0,
	         "too large"},
	        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]}}", 8,
	         "at most 8"},
	        {"{\"a\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}", 8, "at most 8"},
	        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"x\":1}}", 8,
	         "nothing else"},
	        {"{\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8,
	         "nothing else"},
	        {"{\"a\":3}", 0, "nothing else"},
	        {"{\"__metadata__\":[]}", 0, "must be an object"},
	        {"{\"__metadata__\":{\"a\":1}}", 0, "no string"},
	        {"{\"__metadata__\":{\"a\":\"[,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,,]"
	         "\"}}",
	         0, "not that of"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct err e = {0};
		struct st_file *f = NULL;
		size_t n = strlen(cases[i].header);
		const char *path = put_file(test_dir(), "bad.safetensors", cases[i].header, n, n,
		                            (size_t)cases[i].data_bytes);
		CHECK_INT(st_open(path, &f, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, cases[i].says);
	}
}

TEST(refuses_sizes)
{
	static const uint64_t sizes[] = {0, 1, 61, 100000001, UINT64_MAX, UINT64_MAX - 7};
	const char text[] = "{" A "}";
	for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
		struct err e = {0};
		struct st_file *f = NULL;
		const char *path =
		        put_file(test_dir(), "size.safetensors", text, sizeof text - 1, sizes[i], 0);
		CHECK_INT(st_open(path, &f, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, "a header of");
	}
	struct err e = {0};
	struct st_file *f = NULL;
	CHECK_INT(sys_write_file(inside(test_dir(), "size.safetensors"), "1234567", 7, &e), 0);
	CHECK_INT(st_open(inside(test_dir(), "size.safetensors"), &f, &e), EXIT_BAD_DATA);
	CHECK_INT(st_open("/dev/null", &f, &e), EXIT_NO_INPUT);
	CHECK_INT(st_open(inside(test_dir(), "nobody"), &f, &e), EXIT_NO_INPUT);
}

TEST(refuses_pickles)
{
	struct err e = {0};
	struct st_file *f = NULL;
	const char *dir = inside(test_dir(), "pickle");
	CHECK_INT(sys_make_dirs(dir, &e), 0);
	CHECK_INT(st_open(dir, &f, &e), EXIT_NO_INPUT);
	CHECK_HAS(e.text, "neither model.safetensors");
	CHECK_INT(sys_write_file(inside(dir, "pytorch_model.bin"), "x", 1, &e), 0);
	CHECK_INT(st_open(dir, &f, &e), EXIT_NO_INPUT);
	CHECK_HAS(e.text, "pytorch_model.bin: a pickle");
}

TEST(shards_and_index)
{
	static const struct st_tensor tensors[] = {{.name = "z", .dtype = ST_BF16, .nd = 1, .shape = {3}},
	                                           {.name = "y", .dtype = ST_F32, .nd = 2, .shape = {2, 3}},
	                                           {.name = "x", .dtype = ST_I64, .nd = 1, .shape = {2}}};
	static const char data[] = "0123456789abcdefghijklmnopqrstuvwxyz";
	struct err e = {0};
	struct st_writer *w = NULL;
	struct st_file *f = NULL;
	const char *dir = inside(test_dir(), "shards");
	CHECK_INT(sys_make_dirs(dir, &e), 0);
	MUST(st_write_create(dir, tensors, 3, 30, &w, &e) == 0);
	CHECK_INT(st_write(w, 1, 12, 12, data + 12, &e), 0);
	CHECK_INT(st_write(w, 0, 0, 6, data, &e), 0);
	CHECK_INT(st_write(w, 2, 0, 16, data, &e), 0);
	CHECK_INT(st_write(w, 1, 0, 12, data, &e), 0);
	CHECK_INT(st_write_close(w, &e), 0);
	MUST(st_open(dir, &f, &e) == 0);
	CHECK_INT(st_count(f), 3);
	for (size_t i = 0; i < 3; i++) {
		char got[64];
		const struct st_tensor *t = st_find(f, tensors[i].name);
		MUST(t && st_read(f, t, 0, t->size_bytes, got, &e) == 0);
		CHECK(!memcmp(got, data, t->size_bytes));
	}
	st_close(f);
	static const char *const bad[] = {
	        "{\"weight_map\":{\"x\":\"../shards/model-00001-of-00002.safetensors\"}}",
	        "{\"weight_map\":{\"x\":\"model-00002-of-00002.safetensors\"}}",
	        "{\"weight_map\":{\"q\":\"model-00001-of-00002.safetensors\"}}",
	        "{\"weight_map\":{\"x\":3}}",
	        "{\"weight_map\":{\"x\":\"config.json\"}}",
	        "{}",
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		CHECK_INT(sys_write_file(inside(dir, "model.safetensors.index.json"), bad[i], strlen(bad[i]),
		                         &e),
		          0);
		CHECK_INT(st_open(dir, &f, &e), EXIT_BAD_DATA);
	}
	MUST(st_write_create(inside(test_dir(), "pickle"), tensors, 1, 1 << 20, &w, &e) == 0);
	CHECK_INT(st_write_close(w, &e), EXIT_INTERNAL);
	CHECK_HAS(e.text, "0 of 6 bytes");
}

/* Bytes of a real file changed at random: an error, or a file all of which can be read. */
TEST(mutated_files)
{
	struct err e = {0};
	char *good = NULL;
	size_t bytes = 0;
	MUST(sys_read_file(inside(test_golden("llama"), "model.safetensors"), 1 << 24, &good, &bytes, &e) ==
	     0);
	size_t header = 8;
	for (int i = 0; i < 4; i++)
		header += (size_t)(unsigned char)good[i] << 8 * i;
	size_t kept = header + 8192; /* the data do not matter: only a small file is written */
	uint64_t key = rng_key(7, "safetensors"), turn = 0;
	const char *path = inside(test_dir(), "mutant.safetensors");
	int accepted = 0;
	for (int round = 0; round < 400; round++) {
		struct st_file *f = NULL;
		char *copy = mem_array(kept, 1);
		memcpy(copy, good, kept);
		for (uint64_t n = 1 + rng_bits(key, turn++) % 3; n--;) {
			size_t at = rng_bits(key, turn++) % header;
			copy[at] = (char)rng_bits(key, turn++);
		}
		FILE *out = fopen(path, "w");
		MUST(out);
		fwrite(copy, 1, kept, out);
		fseek(out, (long)bytes - 1, SEEK_SET);
		fputc(0, out);
		fclose(out);
		if (st_open(path, &f, &e) == 0) {
			accepted++;
			for (size_t i = 0; i < st_count(f); i++) {
				const struct st_tensor *t = st_get(f, i);
				void *p = mem_array(t->size_bytes, 1);
				CHECK_INT(st_read(f, t, 0, t->size_bytes, p, &e), 0);
				free(p);
			}
			st_close(f);
		}
		free(copy);
	}
	CHECK(accepted < 200);
	free(good);
}

/* The folders of real models. Of four, the header alone is kept: its data are made here, NaNs and all. */
static const char *const models[] = {"gpt2", "llama", "hf/llama3", "hf/mistral", "hf/qwen2", "hf/qwen3"};
enum { N_MODELS = sizeof models / sizeof *models };

static void copy_file(const char *from, const char *to)
{
	struct err e = {0};
	char *data = NULL;
	size_t bytes = 0;
	CHECK_INT(sys_read_file(from, 1 << 26, &data, &bytes, &e), 0);
	CHECK_INT(sys_write_file(to, data, bytes, &e), 0);
	free(data);
}

static size_t data_size(const char *header, size_t bytes)
{
	struct arena a = {0};
	struct err e = {0};
	struct json *v = NULL;
	size_t end = 0;
	CHECK_INT(json_parse(&a, "header", header, bytes, &v, &e), 0);
	for (const struct json *t = v ? v->child : NULL; t; t = t->next) {
		const struct json *ends = json_get(t, "data_offsets");
		if (ends && (size_t)ends->child->next->integer > end)
			end = (size_t)ends->child->next->integer;
	}
	arena_free(&a);
	return end;
}

/* A folder with config.json and model.safetensors. */
static const char *model_folder(int i)
{
	struct err e = {0};
	char *header = NULL;
	size_t bytes = 0;
	const char *golden = test_golden(models[i]), *dir = inside(test_dir(), models[i]);
	CHECK_INT(sys_make_dirs(dir, &e), 0);
	copy_file(inside(golden, "config.json"), inside(dir, "config.json"));
	if (models[i][2] != '/') {
		copy_file(inside(golden, "model.safetensors"), inside(dir, "model.safetensors"));
		return dir;
	}
	CHECK_INT(sys_read_file(inside(golden, "header.bin"), 1 << 20, &header, &bytes, &e), 0);
	struct buf b = {0};
	buf_add(&b, header, bytes);
	for (size_t n = data_size(header + 8, bytes - 8) / 4, k = 0; k < n; k++) {
		uint32_t word = (uint32_t)rng_bits(99, k);
		buf_add(&b, &word, 4);
	}
	CHECK_INT(sys_write_file(inside(dir, "model.safetensors"), b.data, b.length, &e), 0);
	buf_free(&b);
	free(header);
	return dir;
}

static void check_same_file(const char *a, const char *b)
{
	struct err e = {0};
	char *x = NULL, *y = NULL;
	size_t n = 0, m = 0;
	CHECK_INT(sys_read_file(a, 1 << 26, &x, &n, &e), 0);
	CHECK_INT(sys_read_file(b, 1 << 26, &y, &m, &e), 0);
	if (n != m || memcmp(x, y, n))
		test_failed(__FILE__, __LINE__, "%s and %s differ", a, b);
	free(x);
	free(y);
}

static bool same_model(const struct model_config *a, const struct model_config *b)
{
	struct buf x = {0}, y = {0};
	hf_model_put_json(a, &x);
	hf_model_put_json(b, &y);
	bool same = !strcmp(x.data, y.data);
	if (!same)
		fprintf(stderr, "%s\n%s\n", x.data, y.data);
	buf_free(&x);
	buf_free(&y);
	return same;
}

/* Hugging Face -> checkpoint -> Hugging Face: the same file, bit for bit, and the same model. */
TEST(there_and_back)
{
	for (int i = 0; i < N_MODELS; i++) {
		struct err e = {0};
		struct hf *h = NULL, *again = NULL;
		struct ckpt *c = NULL;
		const char *dir = model_folder(i), *ours = inside(dir, "ours"), *back = inside(dir, "back");
		CHECK_INT(hf_open(dir, &h, &e), 0);
		CHECK_STR(e.text, "");
		MUST(h);
		CHECK_INT(hf_import(h, ours, &e), 0);
		CHECK_INT(ckpt_open(ours, CKPT_NEWEST, CKPT_VERIFY, &c, &e), 0);
		CHECK_STR(e.text, "");
		MUST(c);
		CHECK_INT(sys_make_dirs(back, &e), 0);
		CHECK_INT(hf_export(c, back, 1 << 30, &e), 0);
		CHECK_STR(e.text, "");
		check_same_file(inside(dir, "model.safetensors"), inside(back, "model.safetensors"));
		MUST(hf_open(back, &again, &e) == 0);
		CHECK(same_model(hf_model(h), hf_model(again)));
		CHECK_INT(hf_family_of(h), hf_family_of(again));
		hf_close(h);
		hf_close(again);
		ckpt_close(c);
	}
}

/* What the checkpoint should hold at [row, column] of a part, by the definition of the two layouts. */
static uint32_t expected(struct st_file *f, const struct hf_part *p, int64_t row, int64_t column)
{
	struct err e = {0};
	uint32_t word = 0;
	const struct st_tensor *t = st_find(f, p->hf_name);
	int third = strstr(p->name, ".key.") ? 1 : strstr(p->name, ".value.") ? 2 : 0;
	bool fused = strstr(p->hf_name, "c_attn") != NULL;
	bool turned = p->nd == 2 && (strstr(p->hf_name, ".c_") != NULL);
	if (strstr(p->name, "word_embeddings") && row >= 131)
		return 0;
	int64_t out = row + (fused ? third * 48 : 0), width = p->nd == 2 ? t->shape[1] : 1;
	int64_t at = turned ? column * width + out : out * width + column;
	CHECK_INT(st_read(f, t, (size_t)at * 4, 4, &word, &e), 0);
	return word;
}

TEST(boxes_of_hugging_face_tensors)
{
	for (int i = 0; i < 2; i++) {
		struct err e = {0};
		struct hf *h = NULL;
		struct st_file *f = NULL;
		const char *dir = test_golden(models[i]);
		uint64_t key = rng_key(1, models[i]), turn = 0;
		MUST(hf_open(dir, &h, &e) == 0 && st_open(dir, &f, &e) == 0);
		for (size_t k = 0; k < hf_count(h); k++) {
			const struct hf_part *p = hf_part(h, k);
			int64_t offset[2] = {0}, extent[2] = {1, 1};
			for (int d = 0; d < p->nd; d++) {
				offset[d] = (int64_t)(rng_bits(key, turn++) % (uint64_t)p->shape[d]);
				extent[d] = 1 + (int64_t)(rng_bits(key, turn++) %
				                          (uint64_t)(p->shape[d] - offset[d]));
			}
			uint32_t *got = mem_array((size_t)(extent[0] * extent[1]), 4);
			CHECK_INT(hf_read_box(h, p->name, offset, extent, DT_f32, got, &e), 0);
			for (int probe = 0; probe < 40; probe++) {
				int64_t r = (int64_t)(rng_bits(key, turn++) % (uint64_t)extent[0]);
				int64_t c = (int64_t)(rng_bits(key, turn++) % (uint64_t)extent[1]);
				CHECK_INT(got[r * extent[1] + c],
				          expected(f, p, offset[0] + r, offset[1] + c));
			}
			free(got);
		}
		const int64_t zero[2] = {0, 0}, large[2] = {1000, 1000};
		float x;
		CHECK_INT(hf_read_box(h, "embedding.word_embeddings.weight", zero, large, DT_f32, &x, &e),
		          EXIT_BAD_DATA);
		CHECK_INT(hf_read_box(h, "nobody", zero, large, DT_f32, &x, &e), EXIT_BAD_DATA);
		hf_close(h);
		st_close(f);
	}
}

/* Half precision widens exactly; older GPT-2 files have no prefix. */
TEST(half_precision_and_old_names)
{
	static const char config[] = "{\"model_type\":\"gpt2\",\"n_layer\":1,\"n_embd\":2,\"n_head\":1,\"n_"
	                             "positions\":2,\"vocab_size\":3}";
	static const struct {
		const char *name;
		int rows, columns;
	} shapes[] = {{"wte.weight", 3, 2},
	              {"wpe.weight", 2, 2},
	              {"h.0.ln_1.weight", 2, 0},
	              {"h.0.ln_1.bias", 2, 0},
	              {"h.0.attn.c_attn.weight", 2, 6},
	              {"h.0.attn.c_attn.bias", 6, 0},
	              {"h.0.attn.c_proj.weight", 2, 2},
	              {"h.0.attn.c_proj.bias", 2, 0},
	              {"h.0.ln_2.weight", 2, 0},
	              {"h.0.ln_2.bias", 2, 0},
	              {"h.0.mlp.c_fc.weight", 2, 8},
	              {"h.0.mlp.c_fc.bias", 8, 0},
	              {"h.0.mlp.c_proj.weight", 8, 2},
	              {"h.0.mlp.c_proj.bias", 2, 0},
	              {"ln_f.weight", 2, 0},
	              {"ln_f.bias", 2, 0}};
	enum { N = sizeof shapes / sizeof *shapes };
	static const uint16_t halves[] = {0x3c00, 0xc000, 0x0001, 0x7bff, 0x8000, 0x7c00};
	static const float values[] = {1, -2, 0x1p-24f, 65504, -0.0f, INFINITY};
	struct st_tensor tensors[N] = {0};
	struct err e = {0};
	struct st_writer *w = NULL;
	struct hf *h = NULL;
	const char *dir = inside(test_dir(), "half");
	for (int i = 0; i < N; i++)
		tensors[i] = (struct st_tensor){.name = shapes[i].name,
		                                .dtype = ST_F16,
		                                .nd = shapes[i].columns ? 2 : 1,
		                                .shape = {shapes[i].rows, shapes[i].columns}};
	CHECK_INT(sys_make_dirs(dir, &e), 0);
	CHECK_INT(sys_write_file(inside(dir, "config.json"), config, sizeof config - 1, &e), 0);
	MUST(st_write_create(dir, tensors, N, 1 << 20, &w, &e) == 0);
	for (size_t i = 0; i < N; i++)
		for (size_t k = 0;
		     k < (size_t)shapes[i].rows * (size_t)(shapes[i].columns ? shapes[i].columns : 1); k++)
			CHECK_INT(st_write(w, i, 2 * k, 2, &halves[k % 6], &e), 0);
	CHECK_INT(st_write_close(w, &e), 0);
	CHECK_INT(hf_open(dir, &h, &e), 0);
	CHECK_STR(e.text, "");
	MUST(h);
	const int64_t zero[2] = {0, 0}, extent[2] = {3, 2};
	float got[6];
	CHECK_INT(hf_read_box(h, "embedding.word_embeddings.weight", zero, extent, DT_f32, got, &e), 0);
	CHECK(!memcmp(got, values, sizeof got));
	CHECK_INT(hf_dtype(h, 0), DT_f32);
	hf_close(h);
}

/* Models that cannot be taken over say why. */
TEST(configs_that_are_refused)
{
	static const struct {
		const char *model, *from, *to, *says;
	} cases[] = {
	        {"llama", "\"llama\"", "\"mamba\"", "\"model_type\" is mamba; gpt2, llama"},
	        {"llama", "\"model_type\"", "\"model_tope\"", "\"model_type\": missing"},
	        {"llama", "\"hidden_size\": 48", "\"hidden_size\": 40",
	         "has shape [131, 48]; config.json makes it [131, 40]"},
	        {"llama", "\"hidden_size\": 48", "\"hidden_size\": -1", "hidden_size"},
	        {"llama", "\"hidden_size\": 48", "\"hidden_size\": 4.5", "must be an integer"},
	        {"llama", "\"hidden_size\": 48", "\"hidden_size\": null", "missing"},
	        {"llama", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3",
	         "model.layers.2.input_layernorm.weight is missing"},
	        {"llama", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1",
	         "belongs to no part of a llama model"},
	        {"llama", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000", "num_layers"},
	        {"llama", "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "does not divide"},
	        {"llama", "\"silu\"", "\"tanh\"", "silu and gelu_pytorch_tanh"},
	        {"llama", "\"default\"", "\"yarn\"", "\"default\" and \"llama3\""},
	        {"llama", "\"default\"", "\"llama3\"", "missing in the rope scaling"},
	        {"llama", "\"attention_bias\": false", "\"attention_bias\": true", "both or none"},
	        {"hf/qwen2", "\"use_sliding_window\": false",
	         "\"sliding_window\": 4, \"use_sliding_window\": true", "there before"},
	        {"gpt2", "\"scale_attn_weights\": true", "\"scale_attn_weights\": false",
	         "only true is built"},
	        {"gpt2", "\"gelu_new\"", "\"silu\"", "are built"},
	        {"gpt2", "\"n_head\": 4", "\"n_head\": 5", "no multiple"},
	        {"gpt2", "{", "{{", "JSON"},
	};
	for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
		struct err e = {0};
		struct hf *h = NULL;
		char *text = NULL;
		size_t bytes = 0;
		struct buf b = {0};
		const char *golden = test_golden(cases[i].model), *dir = inside(test_dir(), "refused");
		CHECK_INT(sys_make_dirs(dir, &e), 0);
		CHECK_INT(sys_read_file(inside(golden, "config.json"), 1 << 20, &text, &bytes, &e), 0);
		char *at = strstr(text, cases[i].from);
		MUST(at);
		buf_add(&b, text, (size_t)(at - text));
		buf_puts(&b, cases[i].to);
		buf_puts(&b, at + strlen(cases[i].from));
		CHECK_INT(sys_write_file(inside(dir, "config.json"), b.data, b.length, &e), 0);
		if (cases[i].model[2] != '/')
			copy_file(inside(golden, "model.safetensors"), inside(dir, "model.safetensors"));
		CHECK_INT(hf_open(dir, &h, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, cases[i].says);
		buf_free(&b);
		free(text);
	}
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
