"""What a graph needs in memory, and how to need less.

shapes      size of every value as a function of the batch
liveness    in which order a runtime allocates and frees them
arena       where its allocator puts them: the peak of a run
merge       constants folded, equal subexpressions merged
recompute   cheap values computed again where keeping them costs more
order       nodes ordered so that the peak is low
trade       convolutions computed again where little compute saves much memory
narrow      weight gradients at the peak made in two halves
pocket      a place for small values, out of the way of large ones
model       the peak as fixed bytes + bytes per sample, by kind, for the manifest
optimise    all of it, for one graph
"""
