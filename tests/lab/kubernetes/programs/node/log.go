// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// maxLogLine is where a line is broken into parts, as container runtimes do.
const maxLogLine = 16 << 10

// logFile is a container's log in the format that kubelets read:
// https://github.com/kubernetes/design-proposals-archive/blob/main/node/kubelet-cri-logging.md
type logFile struct {
	mu   sync.Mutex
	file *os.File
}

func openLog(path string) (*logFile, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, err
	}
	return &logFile{file: file}, nil
}

func (l *logFile) Close() error { return l.file.Close() }

func (l *logFile) stream(name string) io.Writer { return &logStream{log: l, name: name} }

// logStream writes what comes at once: an unfinished line as a partial one.
type logStream struct {
	log  *logFile
	name string
}

func (s *logStream) Write(data []byte) (int, error) {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	var out bytes.Buffer
	now := time.Now().UTC().Format(time.RFC3339Nano)
	for rest := data; len(rest) > 0; {
		line, tag, used := rest, "P", len(rest)
		if end := bytes.IndexByte(rest, '\n'); end >= 0 {
			line, tag, used = rest[:end], "F", end+1
		}
		if len(line) > maxLogLine {
			line, tag, used = line[:maxLogLine], "P", maxLogLine
		}
		fmt.Fprintf(&out, "%s %s %s %s\n", now, s.name, tag, line)
		rest = rest[used:]
	}
	if _, err := s.log.file.Write(out.Bytes()); err != nil {
		return 0, err
	}
	return len(data), nil
}
