/* Ends what base/option_fields.h or base/option_rows.h began. No include guard on purpose. */
#undef BOOL
#undef INT
#undef DOUBLE
#undef STRING
#undef LIST
#undef ENUM
#undef OPTION_STRING_
#undef OPTION_STRING_OF
#undef OPTION_KEY
#undef OPTION_OFFSET
