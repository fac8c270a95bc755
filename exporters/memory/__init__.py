"""What a graph needs in memory, and how to need less.

shapes      size of every value as a function of the batch
liveness    in which order a runtime allocates and frees them
arena       where its allocator puts them: the peak of a run
passes      equal subexpressions merged, cheap maps recomputed, nodes ordered, so that the peak is low
model       the peak as fixed bytes + bytes per sample, by kind, for the manifest
"""
