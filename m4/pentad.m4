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
# PENTAD_CUDA: --with-cuda[=DIR], --with-cuda-arch. Finds nvcc, the runtime, cuBLASLt and NCCL (all needed) and
# cuDNN (optional: without it attention is our own kernel). Sets NVCC, CUDA_CFLAGS, CUDA_LIBS, CUDA_GENCODE, the
# conditionals HAVE_CUDA and HAVE_CUDNN, and two rows of the table that configure prints.
AC_DEFUN([PENTAD_CUDA_LIBRARY], [
  AC_MSG_CHECKING([for $2])
  save_CPPFLAGS=$CPPFLAGS; save_LIBS=$LIBS
  CPPFLAGS="$CPPFLAGS $CUDA_CFLAGS"; LIBS="$CUDA_LIBS $3 $LIBS"
  AC_LINK_IFELSE([AC_LANG_PROGRAM([[#include <stdbool.h>
#include <$1>]], [[return $2 == 0;]])], [$4; found=yes], [$5; found=no])
  CPPFLAGS=$save_CPPFLAGS; LIBS=$save_LIBS
  AC_MSG_RESULT([$found])
])
AC_DEFUN([PENTAD_CUDA], [
  AC_ARG_WITH([cuda], [AS_HELP_STRING([--with-cuda@<:@=DIR@:>@], [CUDA toolkit: nvcc, cuBLAS, NCCL, cuDNN])], [], [with_cuda=auto])
  AC_ARG_WITH([cuda-arch], [AS_HELP_STRING([--with-cuda-arch=LIST], [devices to compile for, "sm_80 sm_90 sm_100" (default: sm_90)])], [], [with_cuda_arch=sm_90])
  AC_ARG_WITH([cudnn], [AS_HELP_STRING([--without-cudnn], [attention by own kernels alone])], [], [with_cudnn=auto])
  have_CUDA=no; have_CUDNN=no; NVCC=; CUDA_CFLAGS=; CUDA_LIBS=; CUDA_GENCODE=; CUDA_where=no; CUDNN_where=no
  AS_IF([test "x$with_cuda" != xno], [
    AS_IF([test "x$with_cuda" != xauto && test "x$with_cuda" != xyes], [cuda_path="$with_cuda/bin"],
      [cuda_path="$PATH$PATH_SEPARATOR/usr/local/cuda/bin"])
    AC_PATH_PROG([NVCC], [nvcc], [], [$cuda_path])
    AS_IF([test -n "$NVCC"], [
      cuda_root=`dirname "$NVCC"`; cuda_root=`cd "$cuda_root/.." && pwd -P`
      cuda_lib=$cuda_root/lib64; test -d "$cuda_lib" || cuda_lib=$cuda_root/lib
      CUDA_CFLAGS="-isystem $cuda_root/include"
      CUDA_LIBS="-L$cuda_lib -Wl,-rpath,$cuda_lib -lnccl -lcublasLt -lcudart"
      for arch in $with_cuda_arch; do
        AS_CASE([$arch], [sm_[[0-9]]*], [], [AC_MSG_ERROR([--with-cuda-arch: '$arch' is no device; allowed: sm_80 sm_90 sm_100 …])])
        number=`echo $arch | sed 's/^sm_//'`
        CUDA_GENCODE="$CUDA_GENCODE -gencode arch=compute_$number,code=sm_$number"
      done
      PENTAD_CUDA_LIBRARY([cuda_runtime.h], [cudaLaunchKernelExC], [], [have_CUDA=yes], [have_CUDA=no])
      AS_IF([test $have_CUDA = yes], [PENTAD_CUDA_LIBRARY([cublasLt.h], [cublasLtMatmul], [], [:], [have_CUDA=no])])
      AS_IF([test $have_CUDA = yes], [PENTAD_CUDA_LIBRARY([nccl.h], [ncclCommSplit], [], [:], [have_CUDA=no])])
      CUDA_where="`$NVCC --version | sed -n 's/.*release \([[0-9.]]*\).*/\1/p'` for $with_cuda_arch"
    ])
    AS_IF([test $have_CUDA = yes && test "x$with_cudnn" != xno],
      [PENTAD_CUDA_LIBRARY([cudnn.h], [cudnnBackendExecute], [-lcudnn], [have_CUDNN=yes; CUDA_LIBS="$CUDA_LIBS -lcudnn"; CUDNN_where=found], [:])])
  ])
  AS_IF([test $have_CUDA = no], [
    AS_IF([test "x$with_cuda" != xno && test "x$with_cuda" != xauto],
      [AC_MSG_ERROR([--with-cuda was given, but nvcc, the runtime, cuBLASLt or NCCL was not found (give --with-cuda=DIR, the folder that holds bin/nvcc)])])
    CUDA_CFLAGS=; CUDA_LIBS=; CUDA_where=no
  ])
  AC_SUBST([NVCC]) AC_SUBST([CUDA_CFLAGS]) AC_SUBST([CUDA_LIBS]) AC_SUBST([CUDA_GENCODE])
  AM_CONDITIONAL([HAVE_CUDA], [test $have_CUDA = yes])
  AM_CONDITIONAL([HAVE_CUDNN], [test $have_CUDNN = yes])
  PENTAD_TABLE="$PENTAD_TABLE
    cuda: $CUDA_where (training on GPUs)
    cudnn: $CUDNN_where (fast attention on GPUs)"
])
