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
)

// TestKill9 kills the server again and again under a client's load. After each
// kill the store must be sound, and after each restart the client must find
// everything that it was told is there, each operation done exactly once, and
// see no error at all.
func TestKill9(t *testing.T) {
	rounds := 8
	if s := os.Getenv("BATON_KILLS"); s != "" {
		var err error
		if rounds, err = strconv.Atoi(s); err != nil || rounds < 1 {
			t.Fatalf("BATON_KILLS=%q", s)
		}
	}
	w := newWorld(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rounds)*40*time.Second+2*time.Minute)
	defer cancel()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("BATON_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("BATON_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	m := w.start(ctx, t, 0, guest{options: "vers=3", script: fmt.Sprintf("$WORK crash -control $OUT -seed %d .", seed)})
	defer m.Kill()
	for i := 1; i <= rounds; i++ {
		select {
		case <-m.Done():
			finish(ctx, t, m)
			t.Fatal("the guest ended early")
		case <-time.After(time.Duration(500+r.IntN(3000)) * time.Millisecond):
		}
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
		if err := os.WriteFile(m.Path(fmt.Sprint("verify.", i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		for {
			b, err := os.ReadFile(m.Path(fmt.Sprint("verified.", i)))
			if err == nil && len(b) > 0 {
				if string(b) != "ok" {
					t.Errorf("after kill %d: %s", i, b)
				}
				break
			}
			select {
			case <-m.Done():
				finish(ctx, t, m)
				t.Fatalf("the guest ended after kill %d", i)
			case <-ctx.Done():
				finish(ctx, t, m)
				t.Fatalf("no answer after kill %d", i)
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
	if err := os.WriteFile(m.Path("stop"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	res := finish(ctx, t, m)
	if strings.Count(res.Output, "verified after") != rounds+1 {
		t.Errorf("want %d verifications:\n%s", rounds+1, res.Output)
	}
	t.Logf("output:\n%s", lastLines(res.Output, 20))
}
