package kernel

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/baton-nfs/baton/tests/bed"
	"github.com/baton-nfs/baton/tests/uml"
)

// rounds is how many kills a test makes.
func rounds(t *testing.T, n int) int {
	t.Helper()
	if s := os.Getenv("BATON_KILLS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil || n < 1 {
			t.Fatalf("BATON_KILLS=%q", s)
		}
	}
	return n
}

// crashClient is a guest whose workers keep a model of what they do.
type crashClient struct {
	m        *uml.Guest
	r        *rand.Rand
	verified int
}

// crashClient starts the guest. Everything random comes from BATON_SEED.
func (w *world) crashClient(ctx context.Context, t *testing.T) *crashClient {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("BATON_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("BATON_SEED=%d", seed)
	m := w.start(ctx, t, 0, guest{options: "vers=3", script: fmt.Sprintf("$WORK crash -control $OUT -seed %d .", seed)})
	t.Cleanup(m.Kill)
	return &crashClient{m: m, r: rand.New(rand.NewPCG(seed, 1))}
}

// work lets the client work for a while, min and as much again as the random
// source says.
func (c *crashClient) work(ctx context.Context, t *testing.T, min, more int) {
	t.Helper()
	select {
	case <-c.m.Done():
		finish(ctx, t, c.m)
		t.Fatal("the guest ended early")
	case <-time.After(time.Duration(min+c.r.IntN(more)) * time.Millisecond):
	}
}

// verify lets the client compare everything with its model.
func (c *crashClient) verify(ctx context.Context, t *testing.T, when string) {
	t.Helper()
	c.verified++
	if err := os.WriteFile(c.m.Path(fmt.Sprint("verify.", c.verified)), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for {
		b, err := os.ReadFile(c.m.Path(fmt.Sprint("verified.", c.verified)))
		if err == nil && len(b) > 0 {
			if string(b) != "ok" {
				t.Errorf("after %s: %s", when, b)
			}
			return
		}
		select {
		case <-c.m.Done():
			finish(ctx, t, c.m)
			t.Fatalf("the guest ended after %s", when)
		case <-ctx.Done():
			finish(ctx, t, c.m)
			t.Fatalf("no answer after %s", when)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// end stops the workers, and wants one verification more than were asked for.
func (c *crashClient) end(ctx context.Context, t *testing.T) {
	t.Helper()
	if err := os.WriteFile(c.m.Path("stop"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	res := finish(ctx, t, c.m)
	if strings.Count(res.Output, "verified after") != c.verified+1 {
		t.Errorf("want %d verifications:\n%s", c.verified+1, res.Output)
	}
	t.Logf("output:\n%s", lastLines(res.Output, 20))
}

// TestKill9 kills the server again and again under a client's load. After each
// kill the store must be sound, and after each restart the client must find
// everything that it was told is there, each operation done exactly once, and
// see no error at all.
func TestKill9(t *testing.T) {
	n := rounds(t, 8)
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(n)*40*time.Second+2*time.Minute)
	defer cancel()
	m := w.crashClient(ctx, t)
	for i := 1; i <= n; i++ {
		m.work(ctx, t, 500, 3000)
		if err := w.srv.Kill9(); err != nil {
			t.Fatal(err)
		}
		if c, ok := w.srv.(bed.Checker); ok {
			if err := c.Check(ctx); err != nil {
				t.Fatalf("after kill %d: %v", i, err)
			}
		}
		if err := w.srv.Start(ctx); err != nil {
			t.Fatalf("restart %d: %v", i, err)
		}
		m.verify(ctx, t, fmt.Sprint("kill ", i))
	}
	m.end(ctx, t)
}
