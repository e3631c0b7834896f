#include "base/text.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { LONGEST = 96 };

size_t text_distance(const char *a, const char *b)
{
	size_t row[LONGEST + 1], n = strlen(b);
	if (n > LONGEST || strlen(a) > LONGEST)
		return SIZE_MAX;
	for (size_t j = 0; j <= n; j++)
		row[j] = j;
	for (size_t i = 1; a[i - 1]; i++) {
		size_t diagonal = row[0];
		row[0] = i;
		for (size_t j = 1; j <= n; j++) {
			size_t change = diagonal + (a[i - 1] != b[j - 1]);
			size_t step = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
			diagonal = row[j];
			row[j] = change < step ? change : step;
		}
	}
	return row[n];
}

const char *text_nearest(const char *word, const void *first, size_t n, size_t stride_bytes)
{
	const char *best = NULL;
	size_t least = 1 + (strlen(word) + 1) / 3; /* a third of the letters may be wrong */
	for (size_t i = 0; i < n; i++) {
		const char *name = *(const char *const *)((const char *)first + i * stride_bytes);
		size_t d = text_distance(word, name);
		if (d < least) {
			least = d;
			best = name;
		}
	}
	return best;
}

static char *scaled(char *out, size_t cap, double x, double base, const char *const *units, size_t n)
{
	size_t k = 0;
	while (k + 1 < n && x >= base) {
		x /= base;
		k++;
	}
	snprintf(out, cap, x < 10 && k ? "%.2f%s" : x < 100 && k ? "%.1f%s" : "%.0f%s", x, units[k]);
	return out;
}

char *text_bytes(char *out, size_t cap, double bytes)
{
	static const char *const units[] = {" B", " KiB", " MiB", " GiB", " TiB", " PiB"};
	return scaled(out, cap, bytes, 1024, units, sizeof units / sizeof *units);
}

char *text_count(char *out, size_t cap, double count)
{
	static const char *const units[] = {"", "k", "M", "G", "T", "P"};
	return scaled(out, cap, count, 1000, units, sizeof units / sizeof *units);
}

char *text_duration(char *out, size_t cap, double seconds)
{
	long s = seconds < 0 ? 0 : seconds > 1e9 ? 1000000000 : (long)(seconds + 0.5);
	if (s < 60)
		snprintf(out, cap, "%lds", s);
	else if (s < 3600)
		snprintf(out, cap, "%ldm%02lds", s / 60, s % 60);
	else if (s < 48 * 3600)
		snprintf(out, cap, "%ldh%02ldm", s / 3600, s / 60 % 60);
	else
		snprintf(out, cap, "%ldd%02ldh", s / 86400, s / 3600 % 24);
	return out;
}

char *text_seconds(char *out, size_t cap, double seconds)
{
	if (!(seconds < 60))
		return text_duration(out, cap, seconds);
	snprintf(out, cap, seconds < 1 ? "%.3g ms" : "%.3g s", seconds < 1 ? 1e3 * seconds : seconds);
	return out;
}
