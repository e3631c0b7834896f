# PENTAD_DEPENDENCY(NAME, VARIABLE, PKG-CONFIG MODULE, HEADER, FUNCTION, LIBRARY, required|optional, PURPOSE)
# Finds a library by --with-NAME=DIR, then pkg-config, then header and function on the default paths.
# Sets VARIABLE_CFLAGS, VARIABLE_LIBS, have_VARIABLE=yes|no, the conditional HAVE_VARIABLE, and a row of
# the table that configure prints at its end.
AC_DEFUN([PENTAD_DEPENDENCY], [
  AC_ARG_WITH([$1], [AS_HELP_STRING([--with-$1@<:@=DIR@:>@], [$8])], [], [with_$1=auto])
  have_$2=no; $2_where=
  AS_IF([test "x$with_$1" != xno], [
    AS_IF([test "x$with_$1" != xauto && test "x$with_$1" != xyes], [
      $2_CFLAGS="-I$with_$1/include"; $2_LIBS="-L$with_$1/lib -Wl,-rpath,$with_$1/lib -l$6"; $2_where=$with_$1
    ], [test -n "$PKG_CONFIG" && $PKG_CONFIG --exists $3], [
      $2_CFLAGS=`$PKG_CONFIG --cflags $3`; $2_LIBS=`$PKG_CONFIG --libs $3`
      $2_where="`$PKG_CONFIG --modversion $3`"
    ], [
      $2_CFLAGS=; $2_LIBS="-l$6"; $2_where=found
    ])
    save_CPPFLAGS=$CPPFLAGS; save_LIBS=$LIBS
    CPPFLAGS="$CPPFLAGS -DPCRE2_CODE_UNIT_WIDTH=8 $$2_CFLAGS"; LIBS="$$2_LIBS $LIBS"
    AC_CHECK_HEADER([$4], [AC_MSG_CHECKING([for $5]); AC_LINK_IFELSE([AC_LANG_CALL([], [$5])], [have_$2=yes], [have_$2=no]); AC_MSG_RESULT([$have_$2])])
    CPPFLAGS=$save_CPPFLAGS; LIBS=$save_LIBS
  ])
  AS_IF([test $have_$2 = no], [
    $2_CFLAGS=; $2_LIBS=; $2_where="no"
    AS_IF([test $7 = required],
      [AC_MSG_ERROR([$1 is required ($8). On Debian: see the package list in README.md; elsewhere give --with-$1=DIR])],
      [test "x$with_$1" != xno && test "x$with_$1" != xauto],
      [AC_MSG_ERROR([--with-$1 was given, but $4 or $5 was not found])])
  ])
  AC_SUBST([$2_CFLAGS]) AC_SUBST([$2_LIBS])
  AM_CONDITIONAL([HAVE_$2], [test $have_$2 = yes])
  PENTAD_TABLE="$PENTAD_TABLE
    $1: $$2_where ($8)"
])
