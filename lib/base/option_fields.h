/* Rows as struct fields: include this, then the .def, then base/option_end.h. No include guard on purpose. */
#define BOOL(name, ...) bool name;
#define INT(name, ...) int64_t name;
#define DOUBLE(name, ...) double name;
#define STRING(name, ...) const char *name;
#define LIST(name, ...) struct option_list name;
#define ENUM(name, tag, ...) enum tag name;
