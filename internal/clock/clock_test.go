package clock

import (
	"sync"
	"testing"
	"time"
)

func TestStrictRisesWhenTheWallDoesNot(t *testing.T) {
	times := []int64{100, 100, 90, 200, 150}
	i := 0
	c := Strict{Wall: func() time.Time { v := times[i]; i++; return time.Unix(0, v) }}
	want := []int64{100, 101, 102, 200, 201}
	for _, w := range want {
		if got := c.Now(); got != w {
			t.Fatalf("reading %d, want %d", got, w)
		}
	}
}

func TestStrictConcurrentReadingsDiffer(t *testing.T) {
	c := Strict{Wall: func() time.Time { return time.Unix(0, 5) }}
	var mu sync.Mutex
	seen := map[int64]bool{}
	var wg sync.WaitGroup
	for range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for range 1000 {
				v := c.Now()
				mu.Lock()
				if seen[v] {
					t.Errorf("reading %d twice", v)
				}
				seen[v] = true
				mu.Unlock()
			}
		}()
	}
	wg.Wait()
}

func TestNotBefore(t *testing.T) {
	c := Strict{Wall: func() time.Time { return time.Unix(0, 5) }}
	c.NotBefore(50)
	if got := c.Now(); got != 51 {
		t.Fatalf("reading %d after NotBefore(50)", got)
	}
	c.NotBefore(10)
	if got := c.Now(); got != 52 {
		t.Fatalf("reading %d after NotBefore(10)", got)
	}
}
