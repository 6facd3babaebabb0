package graph

// For the tests of package graph_test.
const RaceEnabled = raceEnabled
