// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

const (
	// outputDelay is how long output of what a container left behind is waited for.
	outputDelay = 2 * time.Second
	// restartDelay grows by itself with every restart, to at most maxRestartDelay.
	restartDelay    = 200 * time.Millisecond
	maxRestartDelay = 10 * time.Second
)

// container is one container of a pod: a local process, restarted as the policy says, and what was executed in it.
//
// States: waiting -> running -> terminated [-> running ...]; stopping ends it in any of them.
type container struct {
	pod       *pod
	spec      v1.Container
	policy    v1.RestartPolicy
	directory string
	output    *broadcast
	errors    *broadcast
	// stopping is closed when the container has to end, done when it has.
	stopping chan struct{}
	stopOnce sync.Once
	done     chan struct{}

	mu       sync.Mutex
	process  *process
	started  metav1.Time
	last     *v1.ContainerStateTerminated
	over     bool
	restarts int32
	executed map[*process]struct{}
}

func newContainer(p *pod, spec v1.Container, policy v1.RestartPolicy) *container {
	return &container{
		pod: p, spec: spec, policy: policy,
		directory: filepath.Join(p.directory, spec.Name),
		output:    newBroadcast(), errors: newBroadcast(),
		stopping: make(chan struct{}), done: make(chan struct{}),
		executed: map[*process]struct{}{},
	}
}

// logPath is outside the working directory: a container does not see its own log.
func (c *container) logPath() string { return c.directory + ".log" }

func (c *container) id() string { return fmt.Sprintf("%s_%s", c.pod.uid, c.spec.Name) }

func (c *container) run() {
	defer close(c.done)
	delay := restartDelay
	for {
		code, message := c.runOnce()
		again := c.policy == v1.RestartPolicyAlways || (c.policy == v1.RestartPolicyOnFailure && code != 0)
		c.finish(code, message, !again)
		if !again {
			return
		}
		select {
		case <-c.stopping:
			c.finish(code, message, true)
			return
		case <-time.After(delay):
		}
		delay = min(2*delay, maxRestartDelay)
	}
}

func (c *container) finish(code int, message string, over bool) {
	c.mu.Lock()
	reason := "Completed"
	if code != 0 {
		reason = "Error"
	}
	if c.process != nil || c.last == nil {
		c.last = &v1.ContainerStateTerminated{
			ExitCode: int32(code), Reason: reason, Message: message,
			StartedAt: c.started, FinishedAt: metav1.Now(), ContainerID: "lab://" + c.id(),
		}
	}
	c.process, c.over = nil, over
	if !over {
		c.restarts++
	}
	c.mu.Unlock()
	c.pod.touch()
}

// runOnce runs the main process to its end. What could not be started has code 128, as in other runtimes.
func (c *container) runOnce() (code int, message string) {
	if err := os.MkdirAll(c.directory, 0o755); err != nil {
		return 128, err.Error()
	}
	log, err := openLog(c.logPath())
	if err != nil {
		return 128, err.Error()
	}
	defer log.Close()
	argv := append(append([]string{}, c.spec.Command...), c.spec.Args...)
	if len(argv) == 0 {
		argv = []string{"sleep", "infinity"}
	}
	command := c.command(argv, c.spec.TTY)
	stdout, stderr := io.MultiWriter(log.stream("stdout"), c.output), io.MultiWriter(log.stream("stderr"), c.errors)
	var stdin io.Reader
	input := &mainInput{}
	if c.spec.Stdin {
		stdin = input.open()
		defer input.close()
	}
	started, err := startProcess(command, c.spec.TTY, stdin, stdout, stderr, nil)
	if err != nil {
		return 128, err.Error()
	}
	started.input = input
	c.mu.Lock()
	c.process, c.started, c.over = started, metav1.Now(), false
	c.mu.Unlock()
	c.pod.touch()
	ended := make(chan struct{})
	go func() {
		select {
		case <-c.stopping:
			started.signal(syscall.SIGTERM)
		case <-ended:
		}
	}()
	code, err = started.wait()
	close(ended)
	if err != nil {
		return 128, err.Error()
	}
	return code, ""
}

// command prepares a process of this container: its directory, its environment, a group of its own.
func (c *container) command(argv []string, tty bool) *exec.Cmd {
	command := exec.Command(argv[0], argv[1:]...)
	command.Dir = c.directory
	if c.spec.WorkingDir != "" {
		command.Dir = c.spec.WorkingDir
	}
	command.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + c.directory, "HOSTNAME=" + c.pod.name,
	}
	if tty {
		command.Env = append(command.Env, "TERM=xterm")
	}
	for _, one := range c.spec.Env {
		if one.ValueFrom == nil {
			command.Env = append(command.Env, one.Name+"="+one.Value)
		}
	}
	return command
}

// stop ends the main process, by TERM and after grace by KILL, and everything that was executed beside it.
func (c *container) stop(grace time.Duration) {
	c.stopOnce.Do(func() { close(c.stopping) })
	select {
	case <-c.done:
	case <-time.After(grace):
	}
	c.mu.Lock()
	if c.process != nil {
		c.process.signal(syscall.SIGKILL)
	}
	for one := range c.executed {
		one.signal(syscall.SIGKILL)
	}
	c.mu.Unlock()
	<-c.done
}

func (c *container) running() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.process != nil
}

func (c *container) status() v1.ContainerStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	told := v1.ContainerStatus{
		Name: c.spec.Name, Image: c.spec.Image, ImageID: "lab://" + c.spec.Image, ContainerID: "lab://" + c.id(),
		RestartCount: c.restarts,
	}
	isStarted := c.process != nil
	told.Started, told.Ready = &isStarted, isStarted
	switch {
	case c.process != nil:
		told.State.Running = &v1.ContainerStateRunning{StartedAt: c.started}
		if c.last != nil {
			told.LastTerminationState.Terminated = c.last
		}
	case c.over:
		told.State.Terminated = c.last
	case c.last != nil:
		told.State.Waiting = &v1.ContainerStateWaiting{Reason: "CrashLoopBackOff"}
		told.LastTerminationState.Terminated = c.last
	default:
		told.State.Waiting = &v1.ContainerStateWaiting{Reason: "ContainerCreating"}
	}
	return told
}

// execute runs a command beside the main process and gives its exit code.
func (c *container) execute(argv []string, tty bool, stdin io.Reader, stdout, stderr io.Writer, resize <-chan remotecommand.TerminalSize) (int, error) {
	if len(argv) == 0 {
		return 0, errors.New("no command was given")
	}
	if !c.running() {
		return 0, fmt.Errorf("container `%s` is not running", c.spec.Name)
	}
	started, err := startProcess(c.command(argv, tty), tty, stdin, stdout, stderr, resize)
	if err != nil {
		return 0, err
	}
	c.mu.Lock()
	c.executed[started] = struct{}{}
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(c.executed, started)
		c.mu.Unlock()
	}()
	return started.wait()
}

// attach connects a client to the main process until that ends, or until the client's input does when it gave one.
func (c *container) attach(stdin io.Reader, stdout, stderr io.Writer, resize <-chan remotecommand.TerminalSize) error {
	c.mu.Lock()
	main := c.process
	c.mu.Unlock()
	if main == nil {
		return fmt.Errorf("container `%s` is not running", c.spec.Name)
	}
	if stdout != nil {
		c.output.add(stdout)
		// not before the return: a client that reads nothing holds the lock until its connection is closed
		defer func() { go c.output.remove(stdout) }()
	}
	if stderr != nil {
		c.errors.add(stderr)
		defer func() { go c.errors.remove(stderr) }()
	}
	go main.follow(resize)
	if stdin != nil && c.spec.Stdin {
		go func() {
			_, _ = io.Copy(main.input, stdin)
			if c.spec.StdinOnce {
				main.input.close()
			}
		}()
	}
	<-main.ended
	return nil
}

// process is a command that runs, with or without a terminal.
type process struct {
	command  *exec.Cmd
	terminal *os.File
	drained  chan struct{}
	ended    chan struct{}
	input    *mainInput
}

func startProcess(command *exec.Cmd, tty bool, stdin io.Reader, stdout, stderr io.Writer, resize <-chan remotecommand.TerminalSize) (*process, error) {
	p := &process{command: command, ended: make(chan struct{})}
	if tty {
		// a session of its own, and with it a group
		terminal, err := pty.Start(command)
		if err != nil {
			return nil, err
		}
		p.terminal, p.drained = terminal, make(chan struct{})
		go func() {
			defer close(p.drained)
			if stdout == nil {
				stdout = io.Discard
			}
			_, _ = io.Copy(stdout, terminal)
		}()
		if stdin != nil {
			go func() { _, _ = io.Copy(terminal, stdin) }()
		}
		go p.follow(resize)
		return p, nil
	}
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.WaitDelay = outputDelay
	command.Stdout, command.Stderr = stdout, stderr
	var into io.WriteCloser
	if stdin != nil {
		pipe, err := command.StdinPipe()
		if err != nil {
			return nil, err
		}
		into = pipe
	}
	if err := command.Start(); err != nil {
		return nil, err
	}
	if into != nil {
		// not by exec.Cmd: its Wait would wait for a client that never ends its input
		go func() {
			_, _ = io.Copy(into, stdin)
			_ = into.Close()
		}()
	}
	return p, nil
}

// wait gives the exit code when the process has ended and its output was passed on.
func (p *process) wait() (int, error) {
	defer close(p.ended)
	err := p.command.Wait()
	if p.terminal != nil {
		select {
		case <-p.drained:
		case <-time.After(outputDelay):
		}
		_ = p.terminal.Close()
	}
	var exit *exec.ExitError
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return p.command.ProcessState.ExitCode(), nil
	case errors.As(err, &exit):
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return 128 + int(status.Signal()), nil
		}
		return exit.ExitCode(), nil
	default:
		return 0, err
	}
}

func (p *process) signal(number syscall.Signal) { _ = syscall.Kill(-p.command.Process.Pid, number) }

// follow gives the terminal the sizes that come, until there are no more.
func (p *process) follow(resize <-chan remotecommand.TerminalSize) {
	if resize == nil {
		return
	}
	for size := range resize {
		if p.terminal != nil && size.Width > 0 && size.Height > 0 {
			_ = pty.Setsize(p.terminal, &pty.Winsize{Rows: size.Height, Cols: size.Width})
		}
	}
}

// mainInput is the input of a main process: everybody who is attached writes to it.
type mainInput struct {
	reader *io.PipeReader
	writer *io.PipeWriter
}

func (m *mainInput) open() io.Reader {
	m.reader, m.writer = io.Pipe()
	return m.reader
}

func (m *mainInput) Write(data []byte) (int, error) { return m.writer.Write(data) }

func (m *mainInput) close() { _ = m.writer.Close() }

// broadcast passes output on to everybody who is attached; one that fails is left out from then on.
type broadcast struct {
	mu      sync.Mutex
	writers map[io.Writer]struct{}
}

func newBroadcast() *broadcast { return &broadcast{writers: map[io.Writer]struct{}{}} }

func (b *broadcast) add(writer io.Writer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.writers[writer] = struct{}{}
}

func (b *broadcast) remove(writer io.Writer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.writers, writer)
}

func (b *broadcast) Write(data []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for writer := range b.writers {
		if _, err := writer.Write(data); err != nil {
			delete(b.writers, writer)
		}
	}
	return len(data), nil
}
