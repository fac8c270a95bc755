"""One module for each way samples lie on disk; `edgelocal.data.pipeline` chooses among them.

Every format offers `find(path) -> Parts`: the splits it recognises at `path`, each with the function that opens it,
and nothing where the format is another. Finding reads names only.
"""
