package mirror

// MostPasses is how many passes over what is dirty a job makes at most, for tests.
const MostPasses = patience + 2
