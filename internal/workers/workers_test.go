package workers

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Work waits while all goroutines are busy, runs in order when one is free, and
// no more run at a time than allowed.
func TestBoundAndOrder(t *testing.T) {
	gate, last := make(chan struct{}), make(chan struct{})
	var mu sync.Mutex
	var order []int
	var running, most atomic.Int64
	p := New(2, func(i int) {
		most.Store(max(most.Load(), running.Add(1)))
		defer running.Add(-1)
		if i < 2 {
			<-gate
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if order = append(order, i); len(order) == 298 {
			close(last)
		}
	})
	for i := range 300 { // beyond the ring's first size
		p.Submit(i)
	}
	mu.Lock()
	if len(order) != 0 {
		t.Errorf("%d ran while both goroutines were busy", len(order))
	}
	mu.Unlock()
	gate <- struct{}{} // one goroutine does all the rest, in order
	<-last
	for i, v := range order {
		if v != i+2 {
			t.Fatalf("place %d has %d", i, v)
		}
	}
	close(gate)
	p.Close()
	if most.Load() > 2 {
		t.Errorf("%d at a time", most.Load())
	}
}

// Goroutines that are idle are used again; none is left after Close, and what is
// submitted then runs all the same.
func TestReuseAndClose(t *testing.T) {
	var ran atomic.Int64
	done := make(chan struct{})
	p := New(8, func(f func()) { ran.Add(1); f() })
	for range 1000 {
		p.Submit(func() { done <- struct{}{} })
		<-done
	}
	p.mu.Lock()
	// The next Submit may come before the last goroutine has become idle.
	if p.n > 2 {
		t.Errorf("%d goroutines for one caller", p.n)
	}
	p.mu.Unlock()
	p.Close()
	p.Submit(func() { close(done) })
	<-done
	p.Close()
	if ran.Load() != 1001 || p.n != 0 {
		t.Errorf("%d ran, %d goroutines", ran.Load(), p.n)
	}
}

func BenchmarkSubmit(b *testing.B) {
	var wg sync.WaitGroup
	p := New(64, func(*int) { wg.Done() })
	b.ReportAllocs()
	x := new(int)
	for range b.N {
		wg.Add(1)
		p.Submit(x)
	}
	wg.Wait()
	p.Close()
}

// While the queue stands still an elastic pool grows, to its limit; as soon as work
// is done again it does not, and what is too much goes.
func TestElastic(t *testing.T) {
	gate := make(chan struct{})
	started := make(chan int, 100)
	p := NewElastic(2, 8, func(i int) {
		started <- i
		<-gate
	})
	p.stall = time.Hour // looked at by hand
	look := func(n, goroutines int) {
		t.Helper()
		p.look()
		for range n {
			<-started
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.n != goroutines || len(started) != 0 {
			t.Errorf("%d goroutines, %d too many have started, want %d", p.n, len(started), goroutines)
		}
	}
	for i := range 20 {
		p.Submit(i)
	}
	<-started
	<-started
	look(2, 4)
	gate <- struct{}{} // the queue moves by one
	<-started
	look(0, 4)
	look(2, 6)
	look(2, 8)
	look(0, 8)
	close(gate)
	for range 20 - 9 {
		<-started
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		p.mu.Lock()
		n := p.n
		p.mu.Unlock()
		if n <= 2 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d goroutines are left", n)
		}
	}
	p.Close()
	if p.n != 0 || p.count != 0 {
		t.Errorf("%d goroutines, %d in the queue after Close", p.n, p.count)
	}
}

// The time alone makes it grow.
func TestElasticGrows(t *testing.T) {
	gate := make(chan struct{})
	var running sync.WaitGroup
	running.Add(16)
	p := NewElastic(2, 16, func(int) {
		running.Done()
		<-gate
	})
	for i := range 16 {
		p.Submit(i)
	}
	running.Wait()
	close(gate)
	p.Close()
}
