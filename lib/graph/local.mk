noinst_LIBRARIES += libgraph.a
libgraph_a_SOURCES =
