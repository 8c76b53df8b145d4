package node

import "sync"

// listener is somebody in this process who has to do with targets elsewhere.
// Notice must not block.
type listener interface {
	Notice(target string, instance uint64, node string)
}

// news passes on where targets run: to every import in this process, and to what
// starts and waits for a target. News are hints, from whomever they are: who gets one
// looks for the target there at once, and believes what that says.
//
// Listeners are called with mu held, so that nobody gets news in the wrong order; it
// comes before the locks of imports, and nothing is called with them.
type news struct {
	mu   sync.Mutex
	last map[string]place // by target
	to   map[*listener]struct{}
}

// place is where a target was said to run last.
type place struct {
	node     string
	instance uint64 // 0: not told
}

// join has l hear everything from now on, and first what was said last of every
// target, until leave is called.
func (n *news) join(l listener) (leave func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.to == nil {
		n.to = map[*listener]struct{}{}
	}
	key := &l
	n.to[key] = struct{}{}
	for target, p := range n.last {
		l.Notice(target, p.instance, p.node)
	}
	return func() {
		n.mu.Lock()
		delete(n.to, key)
		n.mu.Unlock()
	}
}

// runs tells that a target runs at a node, as the instance (0: not told). Whether that
// is new, or old news that came late, everybody judges for himself.
func (n *news) runs(target string, instance uint64, node string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.last == nil {
		n.last = map[string]place{}
	}
	n.last[target] = place{node, instance}
	n.tell(target)
}

// tell passes on what was said last of a target. The lock is held.
func (n *news) tell(target string) {
	p := n.last[target]
	for l := range n.to {
		(*l).Notice(target, p.instance, p.node)
	}
}

// gone tells that a target no longer runs at a node. Nobody is told: who is connected
// there finds out by the connection.
func (n *news) gone(target, node string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p, ok := n.last[target]; ok && p.node == node {
		delete(n.last, target)
	}
}

// back tells that a node answers again which did not: what was said to run there is
// looked for there at once.
func (n *news) back(node string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for target, p := range n.last {
		if p.node == node {
			n.tell(target)
		}
	}
}

// waiter is a listener for one target that the start of another one waits for: it
// keeps the newest node.
type waiter struct {
	target string
	node   chan string // room for one
}

func newWaiter(target string) waiter { return waiter{target, make(chan string, 1)} }

// Notice implements listener. It is called by one goroutine at a time.
func (w waiter) Notice(target string, _ uint64, node string) {
	if target != w.target {
		return
	}
	select {
	case <-w.node:
	default:
	}
	w.node <- node
}
