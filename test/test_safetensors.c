/* safetensors files, good and bad, and Hugging Face folders: in, and out again byte for byte. */
#include "base/err.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/rng.h"
#include "base/sys.h"
#include "ckpt/ckpt.h"
#include "model/hf.h"
#include "test/test.h"

#include <stdarg.h>
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
static const char *const models[] = {"gpt2",      "llama",      "mixtral",  "deepseek_v3",
                                     "hf/llama3", "hf/mistral", "hf/qwen2", "hf/qwen3"};
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

/* Hugging Face -> checkpoint -> Hugging Face: the file `want`, bit for bit, and the same model. */
static void go_there_and_back(const char *dir, const char *want)
{
	struct err e = {0};
	struct hf *h = NULL, *again = NULL;
	struct ckpt *c = NULL;
	const char *ours = inside(dir, "ours"), *back = inside(dir, "back");
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
	check_same_file(want, inside(back, "model.safetensors"));
	MUST(hf_open(back, &again, &e) == 0);
	CHECK(same_model(hf_model(h), hf_model(again)));
	CHECK_INT(hf_family_of(h), hf_family_of(again));
	hf_close(h);
	hf_close(again);
	ckpt_close(c);
}

TEST(there_and_back)
{
	for (int i = 0; i < N_MODELS; i++) {
		const char *dir = model_folder(i);
		go_there_and_back(dir, inside(dir, "model.safetensors"));
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
	if ((strstr(p->name, "word_embeddings") || !strcmp(p->name, "output_layer.weight")) && row >= 131)
		return 0;
	int64_t out = row + (fused ? third * 48 : 0), width = p->nd == 2 ? t->shape[1] : 1;
	int64_t at = turned ? column * width + out : out * width + column;
	CHECK_INT(st_read(f, t, (size_t)at * 4, 4, &word, &e), 0);
	return word;
}

TEST(boxes_of_hugging_face_tensors)
{
	for (int i = 0; i < 4; i++) {
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

/* Logical names and shapes of experts and of latent attention, and where they come from. */
TEST(names_of_experts_and_latents)
{
	static const struct {
		const char *model, *ours, *theirs;
		int64_t rows, columns; /* columns 0: of one dimension */
	} rows[] = {
	        {"mixtral", "router.weight", "block_sparse_moe.gate.weight", 4, 48},
	        {"mixtral", "experts.3.gate.weight", "block_sparse_moe.experts.3.w1.weight", 80, 48},
	        {"mixtral", "experts.0.up.weight", "block_sparse_moe.experts.0.w3.weight", 80, 48},
	        {"mixtral", "experts.2.fc2.weight", "block_sparse_moe.experts.2.w2.weight", 48, 80},
	        {"deepseek_v3", "router.weight", "mlp.gate.weight", 8, 48},
	        {"deepseek_v3", "router.expert_bias", "mlp.gate.e_score_correction_bias", 8, 0},
	        {"deepseek_v3", "experts.7.gate.weight", "mlp.experts.7.gate_proj.weight", 40, 48},
	        {"deepseek_v3", "experts.1.up.weight", "mlp.experts.1.up_proj.weight", 40, 48},
	        {"deepseek_v3", "experts.0.fc2.weight", "mlp.experts.0.down_proj.weight", 48, 40},
	        {"deepseek_v3", "shared_experts.gate.weight", "mlp.shared_experts.gate_proj.weight", 40, 48},
	        {"deepseek_v3", "shared_experts.up.weight", "mlp.shared_experts.up_proj.weight", 40, 48},
	        {"deepseek_v3", "shared_experts.fc2.weight", "mlp.shared_experts.down_proj.weight", 48, 40},
	        {"deepseek_v3", "attention.query_down.weight", "self_attn.q_a_proj.weight", 24, 48},
	        {"deepseek_v3", "attention.query_latent_norm.weight", "self_attn.q_a_layernorm.weight", 24,
	         0},
	        {"deepseek_v3", "attention.query_up.weight", "self_attn.q_b_proj.weight", 96, 24},
	        {"deepseek_v3", "attention.key_value_down.weight", "self_attn.kv_a_proj_with_mqa.weight", 24,
	         48},
	        {"deepseek_v3", "attention.key_value_latent_norm.weight", "self_attn.kv_a_layernorm.weight",
	         16, 0},
	        {"deepseek_v3", "attention.key_value_up.weight", "self_attn.kv_b_proj.weight", 128, 16},
	        {"deepseek_v3", "attention.output.weight", "self_attn.o_proj.weight", 48, 64},
	};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
		struct err e = {0};
		struct hf *h = NULL;
		char ours[120], theirs[120];
		bool latent = !strncmp(rows[i].ours, "attention", 9), found = false;
		snprintf(ours, sizeof ours, "decoder.layers.1.%s%s", latent ? "" : "mlp.", rows[i].ours);
		snprintf(theirs, sizeof theirs, "model.layers.1.%s", rows[i].theirs);
		MUST(hf_open(test_golden(rows[i].model), &h, &e) == 0);
		for (size_t k = 0; k < hf_count(h); k++) {
			const struct hf_part *p = hf_part(h, k);
			if (strcmp(p->name, ours))
				continue;
			found = true;
			CHECK_STR(p->hf_name, theirs);
			CHECK_INT(p->nd, rows[i].columns ? 2 : 1);
			CHECK_INT(p->shape[0], rows[i].rows);
			CHECK_INT(p->shape[1], rows[i].columns ? rows[i].columns : 1);
		}
		CHECK(found);
		hf_close(h);
	}
}

TEST(configs_of_experts_and_latents)
{
	struct err e = {0};
	struct hf *h = NULL;
	MUST(hf_open(test_golden("mixtral"), &h, &e) == 0);
	const struct model_config *m = hf_model(h);
	CHECK_INT(m->num_experts, 4);
	CHECK_INT(m->moe_router_topk, 2);
	CHECK_INT(m->moe_ffn_hidden_size, 80);
	CHECK_INT(m->ffn_hidden_size, 80);
	CHECK_STR(m->moe_layer_freq, "1");
	CHECK(!m->moe_router_pre_softmax && m->moe_router_score_function == MODEL_SCORE_SOFTMAX);
	CHECK_INT(m->moe_router_load_balancing_type, MODEL_BALANCING_NONE);
	CHECK_NEAR(m->moe_aux_loss_coeff, 0, 0);
	CHECK_NEAR(m->rotary_base, 1e6, 0);
	hf_close(h);
	MUST(hf_open(test_golden("deepseek_v3"), &h, &e) == 0);
	m = hf_model(h);
	CHECK(m->multi_latent_attention && m->rotary_interleaved && m->moe_router_enable_expert_bias);
	CHECK_INT(m->q_lora_rank, 24);
	CHECK_INT(m->kv_lora_rank, 16);
	CHECK_INT(m->qk_head_dim, 16);
	CHECK_INT(m->qk_pos_emb_head_dim, 8);
	CHECK_INT(m->v_head_dim, 16);
	CHECK_INT(m->kv_channels, 24);
	CHECK_INT(m->num_query_groups, 4);
	CHECK_INT(m->num_experts, 8);
	CHECK_STR(m->moe_layer_freq, "([0]*1+[1]*1)");
	CHECK_INT(m->moe_ffn_hidden_size, 40);
	CHECK_INT(m->ffn_hidden_size, 80);
	CHECK_INT(m->moe_shared_expert_intermediate_size, 40);
	CHECK_INT(m->moe_router_score_function, MODEL_SCORE_SIGMOID);
	CHECK_INT(m->moe_router_num_groups, 2);
	CHECK_INT(m->moe_router_group_topk, 1);
	CHECK_NEAR(m->moe_router_topk_scaling_factor, 2.5, 0);
	CHECK_INT(m->moe_router_load_balancing_type, MODEL_BALANCING_NONE);
	hf_close(h);
}

/* Folders made here. */

struct made {
	struct st_tensor tensor[160];
	size_t n;
	struct arena names;
};

static void add_tensor(struct made *m, int nd, int64_t a, int64_t b, int64_t c, const char *fmt, ...)
{
	char name[200];
	va_list ap;
	va_start(ap, fmt);
	vsnprintf(name, sizeof name, fmt, ap);
	va_end(ap);
	m->tensor[m->n++] = (struct st_tensor){
	        .name = arena_strdup(&m->names, name), .dtype = ST_F32, .nd = nd, .shape = {a, b, c}};
}

/* A folder with this configuration and tensors full of random bits. */
static const char *make_folder(const char *name, const char *config, struct made *m)
{
	struct err e = {0};
	struct st_writer *w = NULL;
	const char *dir = inside(test_dir(), name);
	uint64_t turn = 0;
	CHECK_INT(sys_make_dirs(dir, &e), 0);
	CHECK_INT(sys_write_file(inside(dir, "config.json"), config, strlen(config), &e), 0);
	CHECK_INT(st_write_create(dir, m->tensor, m->n, 1 << 30, &w, &e), 0);
	for (size_t i = 0; w && i < m->n; i++) {
		size_t n = 1;
		for (int d = 0; d < m->tensor[i].nd; d++)
			n *= (size_t)m->tensor[i].shape[d];
		for (size_t k = 0; k < n; k++) {
			uint32_t word = (uint32_t)rng_bits(5, turn++);
			CHECK_INT(st_write(w, i, 4 * k, 4, &word, &e), 0);
		}
	}
	if (w)
		CHECK_INT(st_write_close(w, &e), 0);
	arena_free(&m->names);
	return dir;
}

/* A layer of a Qwen mixture, width 8, two heads of 4 and one of keys. */
static void add_qwen_layer(struct made *m, int layer, bool experts, bool second)
{
	static const char *const heads[] = {"q", "k", "v"};
	for (int i = 0; i < 3; i++) {
		add_tensor(m, 2, i ? 4 : 8, 8, 0, "model.layers.%d.self_attn.%s_proj.weight", layer,
		           heads[i]);
		if (second)
			add_tensor(m, 1, i ? 4 : 8, 0, 0, "model.layers.%d.self_attn.%s_proj.bias", layer,
			           heads[i]);
		else if (i < 2)
			add_tensor(m, 1, 4, 0, 0, "model.layers.%d.self_attn.%s_norm.weight", layer,
			           heads[i]);
	}
	add_tensor(m, 2, 8, 8, 0, "model.layers.%d.self_attn.o_proj.weight", layer);
	add_tensor(m, 1, 8, 0, 0, "model.layers.%d.input_layernorm.weight", layer);
	add_tensor(m, 1, 8, 0, 0, "model.layers.%d.post_attention_layernorm.weight", layer);
	static const char *const parts[] = {"gate", "up", "down"};
	for (int i = 0; i < 3; i++) {
		bool down = i == 2;
		int64_t dense[2] = {down ? 8 : 12, down ? 12 : 8}, one[2] = {down ? 8 : 5, down ? 5 : 8},
		        shared[2] = {down ? 8 : 7, down ? 7 : 8};
		if (!experts)
			add_tensor(m, 2, dense[0], dense[1], 0, "model.layers.%d.mlp.%s_proj.weight", layer,
			           parts[i]);
		for (int k = 0; experts && k < 3; k++)
			add_tensor(m, 2, one[0], one[1], 0, "model.layers.%d.mlp.experts.%d.%s_proj.weight",
			           layer, k, parts[i]);
		if (experts && second)
			add_tensor(m, 2, shared[0], shared[1], 0,
			           "model.layers.%d.mlp.shared_expert.%s_proj.weight", layer, parts[i]);
	}
	if (experts)
		add_tensor(m, 2, 3, 8, 0, "model.layers.%d.mlp.gate.weight", layer);
	if (experts && second)
		add_tensor(m, 2, 1, 8, 0, "model.layers.%d.mlp.shared_expert_gate.weight", layer);
}

#define QWEN_MOE                                                                               \
	"\"num_hidden_layers\": 4, \"hidden_size\": 8, \"num_attention_heads\": 2, "           \
	"\"num_key_value_heads\": 1, "                                                         \
	"\"intermediate_size\": 12, \"max_position_embeddings\": 32, \"rms_norm_eps\": 1e-6, " \
	"\"vocab_size\": 11, "                                                                 \
	"\"num_experts\": 3, \"num_experts_per_tok\": 2, \"moe_intermediate_size\": 5, "       \
	"\"decoder_sparse_step\": 2, \"mlp_only_layers\": [3]"

TEST(qwen_mixtures_there_and_back)
{
	static const struct {
		const char *folder, *config;
		bool second, before;
		double weight;
	} rows[] = {
	        {"qwen3_moe",
	         "{\"model_type\": \"qwen3_moe\", \"norm_topk_prob\": true, \"output_router_logits\": true, "
	         "\"router_aux_loss_coef\": 0.25, " QWEN_MOE "}",
	         false, false, 0.25},
	        {"qwen2_moe",
	         "{\"model_type\": \"qwen2_moe\", \"shared_expert_intermediate_size\": 7, " QWEN_MOE "}",
	         true, true, 0},
	};
	for (int i = 0; i < 2; i++) {
		struct made m = {0};
		struct err e = {0};
		struct hf *h = NULL;
		add_tensor(&m, 2, 11, 8, 0, "model.embed_tokens.weight");
		add_tensor(&m, 2, 11, 8, 0, "lm_head.weight");
		add_tensor(&m, 1, 8, 0, 0, "model.norm.weight");
		for (int layer = 0; layer < 4; layer++)
			add_qwen_layer(&m, layer, layer == 1,
			               rows[i].second); /* every second one, but not 3 */
		const char *dir = make_folder(rows[i].folder, rows[i].config, &m);
		go_there_and_back(dir, inside(dir, "model.safetensors"));
		MUST(hf_open(dir, &h, &e) == 0);
		const struct model_config *c = hf_model(h);
		CHECK_STR(c->moe_layer_freq, "([0]*1+[1]*1+[0]*2)");
		CHECK_INT(c->moe_router_pre_softmax, rows[i].before);
		CHECK_NEAR(c->moe_aux_loss_coeff, rows[i].weight, 0);
		CHECK_INT(c->moe_router_load_balancing_type,
		          rows[i].weight > 0 ? MODEL_BALANCING_AUX : MODEL_BALANCING_NONE);
		CHECK_INT(c->moe_shared_expert_intermediate_size, rows[i].second ? 7 : OPTION_NULL_INT);
		CHECK_INT(c->moe_shared_expert_gate, rows[i].second);
		hf_close(h);
	}
}

/* The golden models once more, with all experts of a layer in one tensor. */

struct golden_moe {
	const char *folder, *gate, *expert; /* names of the router, and of an expert's matrix %d %s */
	const char *parts[3];               /* gate, up, down */
	int first_layer, experts;
	int64_t width;
};

static const struct golden_moe golden_moes[] = {
        {"mixtral",
         "block_sparse_moe.gate.weight",
         "block_sparse_moe.experts.%d.%s.weight",
         {"w1", "w3", "w2"},
         0,
         4,
         80},
        {"deepseek_v3",
         "mlp.gate.weight",
         "mlp.experts.%d.%s.weight",
         {"gate_proj", "up_proj", "down_proj"},
         1,
         8,
         40},
};

/* Copies tensor `name` of a file to byte `at` of tensor i; returns its bytes. */
static size_t copy_tensor(const struct st_file *from, const char *name, struct st_writer *to, size_t i,
                          size_t at)
{
	struct err e = {0};
	const struct st_tensor *t = st_find(from, name);
	size_t bytes = t ? t->size_bytes : 0;
	char *data = mem_array(bytes, 1);
	CHECK(t && !st_read(from, t, 0, bytes, data, &e) && !st_write(to, i, at, bytes, data, &e));
	free(data);
	return bytes;
}

static void copy_experts(const struct golden_moe *g, const struct st_file *from, struct st_writer *to,
                         size_t i, int layer, bool down)
{
	size_t at = 0;
	for (int k = 0; k < g->experts; k++)
		for (int part = down ? 2 : 0; part < (down ? 3 : 2); part++) {
			char rest[100], name[160];
			snprintf(rest, sizeof rest, g->expert, k, g->parts[part]);
			snprintf(name, sizeof name, "model.layers.%d.%s", layer, rest);
			at += copy_tensor(from, name, to, i, at);
		}
}

/* What stays as it is, then two tensors for each layer with experts. */
static void list_fused(const struct golden_moe *g, const struct st_file *from, struct made *m)
{
	for (size_t i = 0; i < st_count(from); i++) {
		const struct st_tensor *t = st_get(from, i);
		if (!strstr(t->name, ".experts.") && !strstr(t->name, "block_sparse_moe"))
			m->tensor[m->n++] = *t;
	}
	for (int layer = g->first_layer; layer < 2; layer++) {
		if (strcmp(g->gate, "mlp.gate.weight"))
			add_tensor(m, 2, g->experts, 48, 0, "model.layers.%d.mlp.gate.weight", layer);
		add_tensor(m, 3, g->experts, 2 * g->width, 48, "model.layers.%d.mlp.experts.gate_up_proj",
		           layer);
		add_tensor(m, 3, g->experts, 48, g->width, "model.layers.%d.mlp.experts.down_proj", layer);
	}
}

static const char *fuse(const struct golden_moe *g)
{
	struct made m = {0};
	struct err e = {0};
	struct st_file *from = NULL;
	struct st_writer *to = NULL;
	const char *golden = test_golden(g->folder), *dir = inside(inside(test_dir(), "fused"), g->folder);
	CHECK_INT(sys_make_dirs(dir, &e), 0);
	copy_file(inside(golden, "config.json"), inside(dir, "config.json"));
	CHECK_INT(st_open(golden, &from, &e), 0);
	list_fused(g, from, &m);
	CHECK_INT(st_write_create(dir, m.tensor, m.n, 1 << 30, &to, &e), 0);
	for (size_t i = 0; i < m.n; i++) {
		const char *name = m.tensor[i].name;
		char gate[160];
		int layer = 0;
		sscanf(name, "model.layers.%d", &layer);
		snprintf(gate, sizeof gate, "model.layers.%d.%s", layer, g->gate);
		if (m.tensor[i].nd == 3)
			copy_experts(g, from, to, i, layer, strstr(name, "down_proj") != NULL);
		else
			copy_tensor(from, strstr(name, "mlp.gate.weight") ? gate : name, to, i, 0);
	}
	CHECK_INT(st_write_close(to, &e), 0);
	st_close(from);
	arena_free(&m.names);
	return dir;
}

static void check_same_boxes(const struct hf *a, const struct hf *b)
{
	uint64_t turn = 0;
	CHECK_INT(hf_count(a), hf_count(b));
	for (size_t i = 0; i < hf_count(a); i++) {
		const struct hf_part *p = hf_part(a, i);
		struct err e = {0};
		int64_t offset[2] = {0}, extent[2] = {1, 1};
		for (int d = 0; d < p->nd; d++) {
			offset[d] = (int64_t)(rng_bits(11, turn++) % (uint64_t)p->shape[d]);
			extent[d] = 1 + (int64_t)(rng_bits(11, turn++) % (uint64_t)(p->shape[d] - offset[d]));
		}
		size_t bytes = (size_t)(extent[0] * extent[1]) * 4;
		char *x = mem_array(bytes, 1), *y = mem_array(bytes, 1);
		CHECK_INT(hf_read_box(a, p->name, offset, extent, DT_f32, x, &e), 0);
		CHECK_INT(hf_read_box(b, p->name, offset, extent, DT_f32, y, &e), 0);
		CHECK(!memcmp(x, y, bytes));
		free(x);
		free(y);
	}
}

TEST(experts_in_one_tensor)
{
	for (int i = 0; i < 2; i++) {
		const struct golden_moe *g = &golden_moes[i];
		struct err e = {0};
		struct hf *apart = NULL, *fused = NULL;
		const char *dir = fuse(g);
		MUST(hf_open(test_golden(g->folder), &apart, &e) == 0);
		CHECK_INT(hf_open(dir, &fused, &e), 0);
		CHECK_STR(e.text, "");
		MUST(fused);
		CHECK(same_model(hf_model(apart), hf_model(fused)));
		check_same_boxes(apart, fused);
		hf_close(apart);
		hf_close(fused);
		go_there_and_back(dir, inside(test_golden(g->folder), "model.safetensors"));
	}
}

/* What predicts further tokens is left out where config.json says that it may be there. */
TEST(further_layers_are_left_out)
{
	static const struct {
		const char *name;
		bool good;
	} rows[] = {{"model.layers.2.eh_proj.weight", true},
	            {"model.layers.2.mlp.experts.3.up_proj.weight", true},
	            {"model.layers.3.eh_proj.weight", false},
	            {"model.layers.02x.eh_proj.weight", false},
	            {"model.layers.99999999999999999999.a", false},
	            {"model.layers.2", false},
	            {"layers.2.eh_proj.weight", false}};
	const char *golden = test_golden("deepseek_v3");
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
		struct made m = {0};
		struct err e = {0};
		struct st_file *from = NULL;
		struct st_writer *to = NULL;
		struct hf *h = NULL;
		float x = 1;
		char folder[32];
		snprintf(folder, sizeof folder, "further%zu", i);
		const char *dir = inside(test_dir(), folder);
		CHECK_INT(sys_make_dirs(dir, &e), 0);
		copy_file(inside(golden, "config.json"), inside(dir, "config.json"));
		CHECK_INT(st_open(golden, &from, &e), 0);
		for (; m.n < st_count(from); m.n++)
			m.tensor[m.n] = *st_get(from, m.n);
		add_tensor(&m, 1, 1, 0, 0, "%s", rows[i].name);
		CHECK_INT(st_write_create(dir, m.tensor, m.n, 1 << 30, &to, &e), 0);
		for (size_t k = 0; k + 1 < m.n; k++)
			copy_tensor(from, m.tensor[k].name, to, k, 0);
		CHECK_INT(st_write(to, m.n - 1, 0, 4, &x, &e), 0);
		CHECK_INT(st_write_close(to, &e), 0);
		CHECK_INT(hf_open(dir, &h, &e), rows[i].good ? 0 : EXIT_BAD_DATA);
		if (!rows[i].good)
			CHECK_HAS(e.text, rows[i].name);
		hf_close(rows[i].good ? h : NULL);
		st_close(from);
		arena_free(&m.names);
	}
}

/* config.json alone. */

static int read_config_text(const char *text, struct arena *keep, struct model_config *m, enum hf_family *f,
                            struct err *e)
{
	struct json *v = NULL;
	*e = (struct err){0};
	int rc = json_parse(keep, "config.json", text, strlen(text), &v, e);
	return rc ? rc : hf_config_read(v, "config.json", keep, m, f, e);
}

#define YARN_MODEL                                                                                 \
	"{\"model_type\": \"qwen3\", \"num_hidden_layers\": 1, \"hidden_size\": 8, "               \
	"\"num_attention_heads\": 2, "                                                             \
	"\"intermediate_size\": 12, \"max_position_embeddings\": 131072, \"rms_norm_eps\": 1e-6, " \
	"\"vocab_size\": 11, "

TEST(yarn_there_and_back)
{
	static const struct {
		const char *scaling;
		int64_t original;
		double fast, slow, mscale, all;
	} rows[] = {
	        {"\"rope_theta\": 1e6, \"rope_scaling\": {\"type\": \"yarn\", \"factor\": 4, "
	         "\"original_max_position_embeddings\": 32768}",
	         32768, 32, 1, 1, 0},
	        {"\"rope_parameters\": {\"rope_theta\": 1e6, \"rope_type\": \"yarn\", \"factor\": 4, "
	         "\"beta_fast\": 16.5, \"beta_slow\": 2, \"mscale\": 0.707, \"mscale_all_dim\": 1.5}",
	         131072, 16.5, 2, 0.707, 1.5},
	        {"\"rope_theta\": 1e6, \"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 4.0, "
	         "\"mscale\": 0.5, \"attention_factor\": 1.1386294361119891, "
	         "\"original_max_position_embeddings\": 8}",
	         8, 32, 1, 1, 0}, /* without mscale_all_dim, transformers does not look at mscale */
	};
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
		struct arena keep = {0};
		struct model_config m, again;
		enum hf_family f;
		struct err e;
		struct buf text = {0}, out = {0};
		buf_printf(&text, "%s%s}", YARN_MODEL, rows[i].scaling);
		CHECK_INT(read_config_text(text.data, &keep, &m, &f, &e), 0);
		CHECK_STR(e.text, "");
		CHECK_INT(m.rope_type, MODEL_ROPE_YARN);
		CHECK_NEAR(m.rotary_base, 1e6, 0);
		CHECK_NEAR(m.rotary_scaling_factor, 4, 0);
		CHECK_INT(m.yarn_original_max_position_embeddings, rows[i].original);
		CHECK_NEAR(m.yarn_beta_fast, rows[i].fast, 0);
		CHECK_NEAR(m.yarn_beta_slow, rows[i].slow, 0);
		CHECK_NEAR(m.mscale, rows[i].mscale, 0);
		CHECK_NEAR(m.mscale_all_dim, rows[i].all, 0);
		hf_config_put(&m, f, DT_f32, NULL, &out);
		CHECK_INT(read_config_text(out.data, &keep, &again, &f, &e), 0);
		CHECK(same_model(&m, &again));
		buf_free(&text);
		buf_free(&out);
		arena_free(&keep);
	}
}

/* A model that no family is built like is not given out for one of them. */
TEST(families_that_do_not_fit)
{
	struct err e = {0};
	struct hf *h = NULL, *d = NULL;
	const char *why = NULL;
	MUST(hf_open(test_golden("mixtral"), &h, &e) == 0 &&
	     hf_open(test_golden("deepseek_v3"), &d, &e) == 0);
	const struct model_config mixtral = *hf_model(h), deepseek = *hf_model(d);
	CHECK(hf_family_fits(HF_MIXTRAL, &mixtral, &why) && hf_family_fits(HF_DEEPSEEK_V3, &deepseek, &why));
	for (int f = 0; f < HF_FAMILY_COUNT; f++) {
		CHECK_INT(hf_family_fits((enum hf_family)f, &mixtral, &why), f == HF_MIXTRAL);
		CHECK_INT(hf_family_fits((enum hf_family)f, &deepseek, &why), f == HF_DEEPSEEK_V3);
	}
#define CHANGED(base, family, change, says)               \
	do {                                              \
		struct model_config m = base;             \
		change;                                   \
		CHECK(!hf_family_fits(family, &m, &why)); \
		CHECK_HAS(why, says);                     \
	} while (0)
	CHANGED(mixtral, HF_MIXTRAL, m.moe_layer_freq = "2", "experts in every layer");
	CHANGED(mixtral, HF_MIXTRAL, m.moe_layer_freq = "[1", "a moe_layer_freq that can be read");
	CHANGED(mixtral, HF_MIXTRAL, m.moe_router_pre_softmax = true, "moe_router_pre_softmax false");
	CHANGED(mixtral, HF_MIXTRAL, m.moe_router_score_function = MODEL_SCORE_SIGMOID, "softmax");
	CHANGED(mixtral, HF_MIXTRAL, m.moe_router_topk_scaling_factor = 2,
	        "moe_router_topk_scaling_factor 1");
	CHANGED(mixtral, HF_MIXTRAL, m.moe_router_num_groups = 2, "no moe_router_num_groups");
	CHANGED(mixtral, HF_MIXTRAL, m.moe_shared_expert_intermediate_size = 8, "no moe_shared");
	CHANGED(mixtral, HF_MIXTRAL, m.rotary_interleaved = true, "rotary_interleaved false");
	CHANGED(mixtral, HF_MIXTRAL, (m.rope_type = MODEL_ROPE_YARN, m.mscale = 2), "mscale 1");
	CHANGED(mixtral, HF_LLAMA, m.num_query_groups = 2, "no num_experts");
	CHANGED(mixtral, HF_QWEN3_MOE, m.add_qkv_bias = true, "add_qkv_bias false");
	CHANGED(mixtral, HF_QWEN2_MOE, m.add_qkv_bias = true, "moe_shared_expert_gate true");
	CHANGED(deepseek, HF_DEEPSEEK_V3, m.moe_layer_freq = "([1]+[0])", "before the first that has some");
	CHANGED(deepseek, HF_DEEPSEEK_V3, m.moe_router_enable_expert_bias = false, "expert_bias true");
	CHANGED(deepseek, HF_DEEPSEEK_V3, m.moe_router_topk = 3, "moe_router_topk twice");
	CHANGED(deepseek, HF_DEEPSEEK_V3, m.moe_shared_expert_intermediate_size = 41,
	        "a multiple of moe_ffn");
	CHANGED(deepseek, HF_DEEPSEEK_V3, m.multi_latent_attention = false, "multi_latent_attention true");
	CHANGED(deepseek, HF_DEEPSEEK_V3, m.window_size = 4, "no window_size");
#undef CHANGED
	hf_close(h);
	hf_close(d);
}

/* Models that cannot be taken over say why. */
#define YARN "\"yarn\", \"beta_slow\": 2"
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
	        {"llama", "\"default\"", "\"longrope\"", "\"default\", \"llama3\" and \"yarn\" are built"},
	        {"llama", "\"default\"", "\"yarn\"", "\"factor\": missing in the rope scaling of yarn"},
	        {"llama", "\"default\"", YARN ", \"factor\": 0.5", "0.5 is too small"},
	        {"llama", "\"default\"", YARN ", \"factor\": 4, \"truncate\": false", "only true is built"},
	        {"llama", "\"default\"", YARN ", \"factor\": 4, \"attention_factor\": 1.5",
	         "only the one that follows from factor"},
	        {"llama", "\"default\"", YARN ", \"factor\": 4, \"mscale_all_dim\": 1",
	         "mscale_all_dim needs it"},
	        {"llama", "\"default\"", YARN ", \"factor\": 4, \"beta_fast\": -1", "yarn_beta_fast"},
	        {"llama", "\"default\"", YARN ", \"factor\": 4, \"original_max_position_embeddings\": 0",
	         "yarn_original_max_position_embeddings"},
	        {"mixtral", "\"num_local_experts\": 4", "\"num_local_experts\": 0",
	         "num_experts: 0 is too small"},
	        {"mixtral", "\"num_local_experts\": 4", "\"num_local_experts\": null", "missing"},
	        {"mixtral", "\"num_local_experts\": 4", "\"num_local_experts\": 1",
	         "is more than there are experts"},
	        {"mixtral", "\"num_local_experts\": 4", "\"num_local_experts\": 5",
	         "block_sparse_moe.gate.weight has shape [4, 48]; config.json makes it [5, 48]"},
	        {"mixtral", "\"num_local_experts\": 4", "\"num_local_experts\": 3",
	         "block_sparse_moe.gate.weight has shape [4, 48]; config.json makes it [3, 48]"},
	        {"mixtral", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000", "is missing"},
	        {"mixtral", "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 2.5",
	         "must be an integer"},
	        {"mixtral", "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 5",
	         "is more than there are"},
	        {"mixtral", "\"router_jitter_noise\": 0.0", "\"router_jitter_noise\": 7",
	         "moe_input_jitter_eps"},
	        {"mixtral", "\"mixtral\"", "\"qwen3_moe\"", "\"num_experts\": missing"},
	        {"mixtral", "\"mixtral\"", "\"llama\"", "mlp.gate_proj.weight is missing"},
	        {"mixtral", "\"intermediate_size\": 80", "\"intermediate_size\": 81",
	         "config.json makes it [81, 48]"},
	        {"mixtral",
	         "\"num_hidden_layers\": 2,\n  \"num_key_value_heads\": 2,\n  \"num_local_experts\": 4",
	         "\"num_hidden_layers\": 100000, \"num_key_value_heads\": 2, \"num_local_experts\": 65536",
	         "num_layers 100000 and num_experts 65536 make about 1.97e+10 tensors; at most 2097152"},
	        {"deepseek_v3", "\"norm_topk_prob\": true", "\"norm_topk_prob\": false",
	         "only true is built"},
	        {"deepseek_v3", "\"n_group\": 2", "\"n_group\": 3", "must divide n_routed_experts"},
	        {"deepseek_v3", "\"n_group\": 2", "\"n_group\": 8", "into groups of two or more"},
	        {"deepseek_v3", "\"n_group\": 2", "\"n_group\": 0", "must be from 1 to n_group"},
	        {"deepseek_v3", "\"topk_group\": 1", "\"topk_group\": 3", "must be from 1 to n_group"},
	        {"deepseek_v3", "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 3",
	         "num_experts_per_tok must be twice as many"},
	        {"deepseek_v3", "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 1",
	         "only false is built for one expert a token"},
	        {"deepseek_v3", "\"n_shared_experts\": 1", "\"n_shared_experts\": null",
	         "must be a number of experts"},
	        {"deepseek_v3", "\"n_shared_experts\": 1", "\"n_shared_experts\": 2",
	         "shared_experts.gate_proj.weight has shape [40, 48]; config.json makes it [80, 48]"},
	        {"deepseek_v3", "\"n_shared_experts\": 1", "\"n_shared_experts\": 4611686018427387904",
	         "must be a number of experts"},
	        {"deepseek_v3", "\"first_k_dense_replace\": 1", "\"first_k_dense_replace\": -1",
	         "must be a number of layers"},
	        {"deepseek_v3", "\"first_k_dense_replace\": 1", "\"first_k_dense_replace\": 0",
	         "model.layers.0.mlp.gate.weight is missing"},
	        {"deepseek_v3", "\"first_k_dense_replace\": 1", "\"first_k_dense_replace\": 2",
	         "model.layers.1.mlp.gate_proj.weight is missing"},
	        {"deepseek_v3", "\"first_k_dense_replace\": 1",
	         "\"moe_layer_freq\": 2, \"first_k_dense_replace\": 1", "only 1 is built"},
	        {"deepseek_v3", "\"use_cache\": true", "\"scoring_func\": \"softmax\"",
	         "only \"sigmoid\" is built"},
	        {"deepseek_v3", "\"use_cache\": true", "\"topk_method\": \"greedy\"",
	         "only \"noaux_tc\" is built"},
	        {"deepseek_v3", "\"q_lora_rank\": 24", "\"q_lora_rank\": null",
	         "self_attn.q_proj.weight is missing"},
	        {"deepseek_v3", "\"q_lora_rank\": 24", "\"q_lora_rank\": 25",
	         "config.json makes it [25, 48]"},
	        {"deepseek_v3", "\"kv_lora_rank\": 16", "\"kv_lora_rank\": null", "missing"},
	        {"deepseek_v3", "\"v_head_dim\": 16", "\"v_head_dim\": 1000000", "too large"},
	        {"deepseek_v3", "\"num_key_value_heads\": 4", "\"num_key_value_heads\": 2",
	         "must be the number of attention heads"},
	        {"deepseek_v3", "\"attention_bias\": false", "\"attention_bias\": true", "both or none"},
	        {"deepseek_v3",
	         "\"num_hidden_layers\": 2,\n  \"num_key_value_heads\": 4,\n  \"num_nextn_predict_layers\": "
	         "1",
	         "\"num_hidden_layers\": 1, \"num_key_value_heads\": 4, \"num_nextn_predict_layers\": 0",
	         "belongs to no part of a deepseek_v3 model"},
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
