/* Messages: the names of kernels, and dying with one sentence. */
#include "simt.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

static std::string demangled(const char *symbol)
{
	int status = 0;
	char *name = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
	std::string result = status == 0 && name ? name : symbol;
	free(name);
	return result;
}

/* Kernels are mostly static functions, which only the symbol table in the file knows. */
static std::string name_in_file(const char *path, uintptr_t offset)
{
	std::ifstream file(path, std::ios::binary);
	std::vector<char> image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
	auto header = reinterpret_cast<const ElfW(Ehdr) *>(image.data());
	if (image.size() < sizeof *header ||
	    header->e_shoff + header->e_shnum * sizeof(ElfW(Shdr)) > image.size())
		return "";
	auto sections = reinterpret_cast<const ElfW(Shdr) *>(image.data() + header->e_shoff);
	for (int i = 0; i < header->e_shnum; i++) {
		if (sections[i].sh_type != SHT_SYMTAB)
			continue;
		auto symbols = reinterpret_cast<const ElfW(Sym) *>(image.data() + sections[i].sh_offset);
		const char *names = image.data() + sections[sections[i].sh_link].sh_offset;
		for (size_t s = 0; s < sections[i].sh_size / sizeof *symbols; s++) {
			if (symbols[s].st_value == offset && (symbols[s].st_info & 0xf) == STT_FUNC)
				return demangled(names + symbols[s].st_name);
		}
	}
	return "";
}

std::string function_name(const void *address)
{
	Dl_info info;
	if (!dladdr(address, &info))
		return "(unknown)";
	if (info.dli_saddr == address && info.dli_sname)
		return demangled(info.dli_sname);
	std::string name = name_in_file("/proc/self/exe", (uintptr_t)address - (uintptr_t)info.dli_fbase);
	return name.empty() ? "(unnamed)" : name;
}

void die(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	fputs("simt: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
	abort();
}

void talk(const char *format, ...)
{
	static const bool wanted = environment("SIMT_TALK", 0) != 0;
	if (!wanted)
		return;
	va_list arguments;
	va_start(arguments, format);
	fputs("simt: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
}

double environment(const char *name, double otherwise)
{
	const char *text = getenv(name);
	return text && *text ? strtod(text, nullptr) : otherwise;
}
