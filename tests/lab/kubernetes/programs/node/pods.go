// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/retry"
	"k8s.io/klog/v2"
)

// node runs the pods of one Node object.
type node struct {
	client    kubernetes.Interface
	name      string
	address   string
	port      int
	directory string

	mu   sync.Mutex
	pods map[types.UID]*pod
}

// pod is what runs of a Pod object. Its containers are added and never taken away.
type pod struct {
	namespace, name string
	uid             types.UID
	directory       string
	started         metav1.Time
	// changed has room for one: somebody is to write the status anew.
	changed chan struct{}
	ended   context.CancelFunc
	ending  bool

	mu         sync.Mutex
	containers map[string]*container
}

func newNode(client kubernetes.Interface, name, address string, port int, directory string) *node {
	return &node{
		client: client, name: name, address: address, port: port, directory: directory,
		pods: map[types.UID]*pod{},
	}
}

func (n *node) register(ctx context.Context) error {
	nodes := n.client.CoreV1().Nodes()
	made := &v1.Node{ObjectMeta: metav1.ObjectMeta{
		Name:   n.name,
		Labels: map[string]string{v1.LabelHostname: n.name, v1.LabelOSStable: "linux"},
	}}
	if _, err := nodes.Create(ctx, made, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		current, err := nodes.Get(ctx, n.name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		now := metav1.Now()
		room := v1.ResourceList{
			v1.ResourceCPU:    resource.MustParse("4"),
			v1.ResourceMemory: resource.MustParse("8Gi"),
			v1.ResourcePods:   resource.MustParse("110"),
		}
		current.Status.Capacity, current.Status.Allocatable = room, room
		current.Status.Addresses = []v1.NodeAddress{
			{Type: v1.NodeInternalIP, Address: n.address},
			{Type: v1.NodeHostName, Address: n.name},
		}
		current.Status.DaemonEndpoints.KubeletEndpoint.Port = int32(n.port)
		current.Status.Conditions = []v1.NodeCondition{{
			Type: v1.NodeReady, Status: v1.ConditionTrue, Reason: "KubeletReady", Message: "the lab's node",
			LastHeartbeatTime: now, LastTransitionTime: now,
		}}
		_, err = nodes.UpdateStatus(ctx, current, metav1.UpdateOptions{})
		return err
	})
}

// followPods returns when all pods that exist were seen, and goes on until ctx ends.
func (n *node) followPods(ctx context.Context) error {
	factory := informers.NewSharedInformerFactory(n.client, 0)
	informer := factory.Core().V1().Pods().Informer()
	handle := func(object any) {
		if seen, ok := object.(*v1.Pod); ok {
			n.take(ctx, seen.DeepCopy())
		}
	}
	registration, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    handle,
		UpdateFunc: func(_, object any) { handle(object) },
		DeleteFunc: func(object any) {
			if tombstone, ok := object.(cache.DeletedFinalStateUnknown); ok {
				object = tombstone.Obj
			}
			if gone, ok := object.(*v1.Pod); ok {
				n.forget(gone.UID)
			}
		},
	})
	if err != nil {
		return err
	}
	factory.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), registration.HasSynced) {
		return fmt.Errorf("the list of pods did not come")
	}
	return nil
}

// take does what a pod's newest version asks for: bind it, start it, end it. It does not wait.
func (n *node) take(ctx context.Context, wanted *v1.Pod) {
	switch {
	case wanted.Spec.NodeName == "" && wanted.DeletionTimestamp == nil:
		go n.bind(ctx, wanted)
	case wanted.Spec.NodeName != n.name:
	case wanted.DeletionTimestamp != nil:
		n.end(ctx, wanted)
	case wanted.Status.Phase != v1.PodSucceeded && wanted.Status.Phase != v1.PodFailed:
		n.start(ctx, wanted)
	}
}

func (n *node) bind(ctx context.Context, wanted *v1.Pod) {
	binding := &v1.Binding{
		ObjectMeta: metav1.ObjectMeta{Namespace: wanted.Namespace, Name: wanted.Name, UID: wanted.UID},
		Target:     v1.ObjectReference{Kind: "Node", Name: n.name},
	}
	err := n.client.CoreV1().Pods(wanted.Namespace).Bind(ctx, binding, metav1.CreateOptions{})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		klog.ErrorS(err, "bind", "pod", klog.KObj(wanted))
	}
}

func (n *node) start(ctx context.Context, wanted *v1.Pod) {
	n.mu.Lock()
	defer n.mu.Unlock()
	running, known := n.pods[wanted.UID]
	if !known {
		podContext, cancel := context.WithCancel(ctx)
		running = &pod{
			namespace: wanted.Namespace, name: wanted.Name, uid: wanted.UID,
			directory: filepath.Join(n.directory, string(wanted.UID)),
			started:   metav1.Now(), changed: make(chan struct{}, 1), ended: cancel,
			containers: map[string]*container{},
		}
		n.pods[wanted.UID] = running
		go n.writeStatus(podContext, running, wanted.Spec.RestartPolicy)
	}
	for _, spec := range wanted.Spec.Containers {
		running.add(spec, wanted.Spec.RestartPolicy)
	}
	for _, spec := range wanted.Spec.EphemeralContainers {
		running.add(v1.Container(spec.EphemeralContainerCommon), v1.RestartPolicyNever)
	}
}

func (p *pod) add(spec v1.Container, policy v1.RestartPolicy) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, known := p.containers[spec.Name]; known || p.ending {
		return
	}
	made := newContainer(p, spec, policy)
	p.containers[spec.Name] = made
	go made.run()
}

func (p *pod) touch() {
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// end stops the pod's containers within its grace period and then has the object removed.
func (n *node) end(ctx context.Context, wanted *v1.Pod) {
	n.mu.Lock()
	running := n.pods[wanted.UID]
	n.mu.Unlock()
	if running != nil {
		running.mu.Lock()
		already := running.ending
		running.ending = true
		running.mu.Unlock()
		if already {
			return
		}
	}
	grace := time.Duration(0)
	if wanted.DeletionGracePeriodSeconds != nil {
		grace = time.Duration(*wanted.DeletionGracePeriodSeconds) * time.Second
	}
	go func() {
		if running != nil {
			running.stop(grace)
		}
		options := metav1.NewDeleteOptions(0)
		options.Preconditions = metav1.NewUIDPreconditions(string(wanted.UID))
		err := n.client.CoreV1().Pods(wanted.Namespace).Delete(ctx, wanted.Name, *options)
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			klog.ErrorS(err, "remove", "pod", klog.KObj(wanted))
		}
	}()
}

// forget ends what runs of a pod whose object is gone.
func (n *node) forget(uid types.UID) {
	n.mu.Lock()
	running := n.pods[uid]
	delete(n.pods, uid)
	n.mu.Unlock()
	if running == nil {
		return
	}
	go func() {
		running.stop(0)
		running.ended()
	}()
}

func (n *node) stopAll(limit time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var ending sync.WaitGroup
	for _, running := range n.pods {
		ending.Go(func() { running.stop(limit / 2) })
	}
	ending.Wait()
}

func (p *pod) stop(grace time.Duration) {
	p.mu.Lock()
	p.ending = true
	running := make([]*container, 0, len(p.containers))
	for _, one := range p.containers {
		running = append(running, one)
	}
	p.mu.Unlock()
	var ending sync.WaitGroup
	for _, one := range running {
		ending.Go(func() { one.stop(grace) })
	}
	ending.Wait()
}

// find gives the container that a request names. With no name, the pod's only one.
func (n *node) find(namespace, podName, name string) (*container, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, running := range n.pods {
		if running.namespace != namespace || running.name != podName {
			continue
		}
		running.mu.Lock()
		defer running.mu.Unlock()
		if found, ok := running.containers[name]; ok {
			return found, nil
		}
		return nil, fmt.Errorf("container `%s` is not in pod `%s/%s`", name, namespace, podName)
	}
	return nil, fmt.Errorf("pod `%s/%s` is not on this node", namespace, podName)
}

func (n *node) hasPod(namespace, podName string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, running := range n.pods {
		if running.namespace == namespace && running.name == podName {
			return true
		}
	}
	return false
}

// writeStatus keeps the Pod object's status as what runs, until ctx ends.
func (n *node) writeStatus(ctx context.Context, running *pod, policy v1.RestartPolicy) {
	pods := n.client.CoreV1().Pods(running.namespace)
	for {
		select {
		case <-ctx.Done():
			return
		case <-running.changed:
		}
		err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
			current, err := pods.Get(ctx, running.name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if current.UID != running.uid {
				return nil
			}
			running.fill(&current.Status, current.Spec, n.address, policy)
			_, err = pods.UpdateStatus(ctx, current, metav1.UpdateOptions{})
			return err
		})
		if err != nil && !apierrors.IsNotFound(err) && ctx.Err() == nil {
			klog.ErrorS(err, "write the status", "pod", klog.KRef(running.namespace, running.name))
		}
	}
}

func (p *pod) fill(status *v1.PodStatus, spec v1.PodSpec, address string, policy v1.RestartPolicy) {
	p.mu.Lock()
	defer p.mu.Unlock()
	status.HostIP, status.HostIPs = address, []v1.HostIP{{IP: address}}
	status.PodIP, status.PodIPs = address, []v1.PodIP{{IP: address}}
	status.StartTime = &p.started
	status.ContainerStatuses, status.EphemeralContainerStatuses = nil, nil
	running, failed := 0, 0
	for _, one := range spec.Containers {
		told := p.tell(one)
		status.ContainerStatuses = append(status.ContainerStatuses, told)
		switch {
		case told.State.Terminated == nil:
			running++
		case told.State.Terminated.ExitCode != 0:
			failed++
		}
	}
	for _, one := range spec.EphemeralContainers {
		told := p.tell(v1.Container(one.EphemeralContainerCommon))
		status.EphemeralContainerStatuses = append(status.EphemeralContainerStatuses, told)
	}
	ready := v1.ConditionFalse
	switch {
	case running > 0 || policy == v1.RestartPolicyAlways:
		status.Phase = v1.PodRunning
		if running == len(spec.Containers) {
			ready = v1.ConditionTrue
		}
	case failed > 0:
		status.Phase = v1.PodFailed
	default:
		status.Phase = v1.PodSucceeded
	}
	for _, kind := range []v1.PodConditionType{v1.PodInitialized, v1.ContainersReady, v1.PodReady} {
		value := ready
		if kind == v1.PodInitialized {
			value = v1.ConditionTrue
		}
		setCondition(status, kind, value)
	}
}

func (p *pod) tell(spec v1.Container) v1.ContainerStatus {
	if made, ok := p.containers[spec.Name]; ok {
		return made.status()
	}
	return v1.ContainerStatus{
		Name: spec.Name, Image: spec.Image,
		State: v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: "ContainerCreating"}},
	}
}

func setCondition(status *v1.PodStatus, kind v1.PodConditionType, value v1.ConditionStatus) {
	for i := range status.Conditions {
		if one := &status.Conditions[i]; one.Type == kind {
			if one.Status != value {
				one.Status, one.LastTransitionTime = value, metav1.Now()
			}
			return
		}
	}
	status.Conditions = append(status.Conditions, v1.PodCondition{Type: kind, Status: value, LastTransitionTime: metav1.Now()})
}
