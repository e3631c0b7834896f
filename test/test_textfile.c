/* Text files: lines of plain and gzip ones, damaged ones. */
#include "base/err.h"
#include "base/mem.h"
#include "base/sys.h"
#include "data/textfile.h"
#include "data/textfile_gzip.h"
#include "test/test.h"

/* gzip of "one\ntwo\r\n". */
static const unsigned char two_lines[] = {0x1f, 0x8b, 8,    0,    0,    0,    0,    0,    2,    3,
                                          0xcb, 0xcf, 0x4b, 0xe5, 0x2a, 0x29, 0xcf, 0xe7, 0xe5, 2,
                                          0,    0x12, 0x6d, 0xed, 0x34, 9,    0,    0,    0};

/* Reads a file of these bytes: its lines put together, each with a '|' behind it. */
static int read_lines(const void *bytes, size_t n, struct buf *out, struct err *e)
{
	char path[300];
	struct textfile *f;
	const char *line;
	size_t length;
	snprintf(path, sizeof path, "%s/lines", test_dir());
	if (sys_write_file(path, bytes, n, e) || textfile_open(path, &f, e))
		return e->code;
	int rc;
	while (!(rc = textfile_line(f, &line, &length, e)) && line) {
		buf_add(out, line, length);
		buf_add(out, "|", 1);
	}
	textfile_close(f);
	return rc;
}

static void check_lines(const void *bytes, size_t n, const char *want)
{
	struct buf b = {0};
	struct err e = {0};
	if (read_lines(bytes, n, &b, &e))
		test_failed(__FILE__, __LINE__, "%s", e.text);
	else
		CHECK_STR(b.data ? b.data : "", want);
	buf_free(&b);
}

TEST(lines_of_plain_and_gzip_files)
{
	unsigned char twice[sizeof two_lines * 2];
	check_lines("", 0, "");
	check_lines("\n", 1, "|");
	check_lines("a", 1, "a|");
	check_lines("\x1f", 1, "\x1f|");
	check_lines("a\n\nb\r\n\xff", 7, "a||b\r|\xff|");
	if (gzip_missing())
		return;
	check_lines(two_lines, sizeof two_lines, "one|two\r|");
	memcpy(twice, two_lines, sizeof two_lines);
	memcpy(twice + sizeof two_lines, two_lines, sizeof two_lines);
	check_lines(twice, 2 * sizeof two_lines, "one|two\r|one|two\r|");
}

TEST(damaged_gzip_files_are_refused)
{
	if (gzip_missing())
		return;
	for (size_t n = 2; n < sizeof two_lines; n++) {
		struct buf b = {0};
		struct err e = {0};
		char at[32];
		snprintf(at, sizeof at, "byte %zu", n);
		CHECK_INT(read_lines(two_lines, n, &b, &e), EXIT_BAD_DATA);
		CHECK_HAS(e.text, "/lines: ");
		CHECK_HAS(e.text, at);
		buf_free(&b);
	}
	for (size_t i = 0; i < 8; i++) { /* the checksum and the size */
		struct buf b = {0};
		struct err e = {0};
		unsigned char bad[sizeof two_lines];
		memcpy(bad, two_lines, sizeof bad);
		bad[sizeof bad - 1 - i] ^= 1;
		CHECK_INT(read_lines(bad, sizeof bad, &b, &e), EXIT_BAD_DATA);
		buf_free(&b);
	}
}

int main(int argc, char **argv)
{
	return test_main(argc, argv);
}
