// Package moves proves that nobody notices when a floating address moves: real
// kernel clients work while addresses move in order, while the machines that have
// them lose power, and while there are two that believe to have one. Package rig is
// its bed, which the benchmark tests/bench/moves and the demonstration tests/demo use, too.
package moves
