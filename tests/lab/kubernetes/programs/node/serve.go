// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	runtimeapi "k8s.io/cri-api/pkg/apis"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-client/pkg/logs"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"
)

const (
	idleTimeout = 4 * time.Hour
	dialTimeout = 5 * time.Second
)

// handler serves the part of the kubelet's API that the API server uses for pods:
// https://github.com/kubernetes/kubernetes/blob/master/pkg/kubelet/server/server.go
func (n *node) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	mux.HandleFunc("GET /pods", n.servePods)
	mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", n.serveLogs)
	for _, method := range []string{"GET", "POST"} {
		mux.HandleFunc(method+" /exec/{namespace}/{pod}/{container}", n.serveExec)
		mux.HandleFunc(method+" /attach/{namespace}/{pod}/{container}", n.serveAttach)
		mux.HandleFunc(method+" /portForward/{namespace}/{pod}", n.servePortForward)
	}
	return mux
}

// servePods lists what runs here, as `nodes/proxy` shows it.
func (n *node) servePods(w http.ResponseWriter, r *http.Request) {
	list, err := n.client.CoreV1().Pods("").List(r.Context(), metav1.ListOptions{FieldSelector: "spec.nodeName=" + n.name})
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	encoder := scheme.Codecs.LegacyCodec(v1.SchemeGroupVersion)
	if err := encoder.Encode(list, w); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

func (n *node) serveExec(w http.ResponseWriter, r *http.Request) {
	found, options, ok := n.prepare(w, r)
	if !ok {
		return
	}
	remotecommand.ServeExec(w, r, stream{found, options}, "", "", "", r.URL.Query()["command"], options,
		idleTimeout, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
}

func (n *node) serveAttach(w http.ResponseWriter, r *http.Request) {
	found, options, ok := n.prepare(w, r)
	if !ok {
		return
	}
	remotecommand.ServeAttach(w, r, stream{found, options}, "", "", "", options,
		idleTimeout, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
}

func (n *node) prepare(w http.ResponseWriter, r *http.Request) (*container, *remotecommand.Options, bool) {
	options, err := remotecommand.NewOptions(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return nil, nil, false
	}
	found, err := n.find(r.PathValue("namespace"), r.PathValue("pod"), r.PathValue("container"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return nil, nil, false
	}
	return found, options, true
}

func (n *node) servePortForward(w http.ResponseWriter, r *http.Request) {
	namespace, name := r.PathValue("namespace"), r.PathValue("pod")
	if !n.hasPod(namespace, name) {
		http.Error(w, fmt.Sprintf("pod `%s/%s` is not on this node", namespace, name), http.StatusNotFound)
		return
	}
	options, err := portforward.NewV4Options(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	portforward.ServePortForward(w, r, forwarder{}, name, "", options,
		idleTimeout, remotecommand.DefaultStreamCreationTimeout, portforward.SupportedProtocols)
}

func (n *node) serveLogs(w http.ResponseWriter, r *http.Request) {
	found, err := n.find(r.PathValue("namespace"), r.PathValue("pod"), r.PathValue("container"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	options, err := parseLogOptions(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	path, err := filepath.Abs(found.logPath())
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/plain")
	out := &flushed{w}
	// a follower gets its head at once, and not with the first line
	out.flush()
	if err := logs.ReadLogs(r.Context(), path, found.id(), options, liveness{n: n, of: found}, out, out); err != nil {
		fmt.Fprintf(out, "%v\n", err)
	}
}

// parseLogOptions reads the parameters of v1.PodLogOptions that say which part of a log is meant.
func parseLogOptions(query url.Values) (*logs.LogOptions, error) {
	options := &logs.LogOptions{Follow: query.Get("follow") == "true", Timestamp: query.Get("timestamps") == "true"}
	var sinceSeconds *int64
	for name, to := range map[string]**int64{
		"tailLines": &options.TailLines, "limitBytes": &options.LimitBytes, "sinceSeconds": &sinceSeconds,
	} {
		if !query.Has(name) {
			continue
		}
		number, err := strconv.ParseInt(query.Get(name), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("`%s`: %w", name, err)
		}
		*to = &number
	}
	if sinceSeconds != nil {
		options.Since = time.Now().Add(-time.Duration(*sinceSeconds) * time.Second)
	}
	if query.Has("sinceTime") {
		since, err := time.Parse(time.RFC3339, query.Get("sinceTime"))
		if err != nil {
			return nil, fmt.Errorf("`sinceTime`: %w", err)
		}
		options.Since = since
	}
	return options, nil
}

// stream runs exec and attach in one container. Of the streams, it uses those that the request asked for.
type stream struct {
	in    *container
	asked *remotecommand.Options
}

func (s stream) ExecInContainer(_ context.Context, _, _, _ string, command []string, stdin io.Reader, stdout, stderr io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	in, out, errors := s.choose(stdin, stdout, stderr)
	// ended in order, and not cut off with the connection, which loses what is on its way
	defer closeAll(stdout, stderr)
	code, err := s.in.execute(command, tty, in, out, errors, resize)
	if err != nil {
		return err
	}
	if code != 0 {
		return utilexec.CodeExitError{Err: fmt.Errorf("exit code %d", code), Code: code}
	}
	return nil
}

func (s stream) AttachContainer(_ context.Context, _, _, _ string, stdin io.Reader, stdout, stderr io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	in, out, errors := s.choose(stdin, stdout, stderr)
	defer closeAll(stdout, stderr)
	return s.in.attach(in, out, errors, resize)
}

func closeAll(streams ...io.Closer) {
	for _, one := range streams {
		if one != nil {
			_ = one.Close()
		}
	}
}

func (s stream) choose(stdin io.Reader, stdout, stderr io.Writer) (in io.Reader, out, errors io.Writer) {
	if s.asked.Stdin {
		in = stdin
	}
	if s.asked.Stdout {
		out = stdout
	}
	if s.asked.Stderr {
		errors = stderr
	}
	return in, out, errors
}

// forwarder connects to ports of this network namespace's loopback.
type forwarder struct{}

func (forwarder) PortForward(ctx context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	dialer := net.Dialer{Timeout: dialTimeout}
	connection, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		return err
	}
	defer connection.Close()
	received := make(chan error, 1)
	go func() {
		_, err := io.Copy(connection, stream)
		_ = connection.(*net.TCPConn).CloseWrite()
		received <- err
	}()
	if _, err := io.Copy(stream, connection); err != nil {
		return err
	}
	_ = stream.Close()
	<-received
	return nil
}

// liveness tells the log reader whether there will be more.
type liveness struct {
	runtimeapi.RuntimeService
	n  *node
	of *container
}

func (l liveness) ContainerStatus(context.Context, string, bool) (*criv1.ContainerStatusResponse, error) {
	state := criv1.ContainerState_CONTAINER_RUNNING
	select {
	case <-l.of.done:
		state = criv1.ContainerState_CONTAINER_EXITED
	default:
	}
	if !l.n.knows(l.of.pod.uid) {
		state = criv1.ContainerState_CONTAINER_EXITED
	}
	return &criv1.ContainerStatusResponse{Status: &criv1.ContainerStatus{State: state}}, nil
}

func (n *node) knows(uid types.UID) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, ok := n.pods[uid]
	return ok
}

// flushed sends every write at once.
type flushed struct{ http.ResponseWriter }

func (f *flushed) Write(data []byte) (int, error) {
	written, err := f.ResponseWriter.Write(data)
	f.flush()
	return written, err
}

func (f *flushed) flush() { _ = http.NewResponseController(f.ResponseWriter).Flush() }
