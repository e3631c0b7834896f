/* Rows of a struct option table. Before the include, OPTION_GROUP is the group's name and OPTION_VALUES the
 * struct in which the group is a member of that name. Include this, then the .def, then base/option_end.h. */
#define OPTION_STRING_(x) #x
#define OPTION_STRING_OF(x) OPTION_STRING_(x)
#define OPTION_KEY(name) .key = OPTION_STRING_OF(OPTION_GROUP) "." #name, .offset_bytes = OPTION_OFFSET(name)
#define OPTION_OFFSET(name) offsetof(OPTION_VALUES, OPTION_GROUP.name)
#define BOOL(name, value_, doc_, ...) \
	{OPTION_KEY(name), .type = OPTION_BOOL, .value = value_, .doc = doc_, __VA_ARGS__},
#define INT(name, value_, min_, max_, unit_, doc_, ...)                      \
	{OPTION_KEY(name), .type = OPTION_INT, .value = value_, .min = min_, \
	 .max = max_,      .unit = unit_,      .doc = doc_,     __VA_ARGS__},
#define DOUBLE(name, value_, min_, max_, unit_, doc_, ...)                      \
	{OPTION_KEY(name), .type = OPTION_DOUBLE, .value = value_, .min = min_, \
	 .max = max_,      .unit = unit_,         .doc = doc_,     __VA_ARGS__},
#define STRING(name, value_, doc_, ...) \
	{OPTION_KEY(name), .type = OPTION_STRING, .value = value_, .doc = doc_, __VA_ARGS__},
#define LIST(name, value_, doc_, ...) \
	{OPTION_KEY(name), .type = OPTION_LIST, .value = value_, .doc = doc_, __VA_ARGS__},
#define ENUM(name, tag, value_, doc_, ...)                               \
	{OPTION_KEY(name),         .type = OPTION_ENUM, .value = value_, \
	 .choices = tag##_choices, .doc = doc_,         __VA_ARGS__},
