"""Mining: hard negatives found by a model's own vectors, written as a data set of their own."""
