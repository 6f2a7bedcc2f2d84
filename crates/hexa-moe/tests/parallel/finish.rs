//! A rank's own time, where another rank differentiates meanwhile.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use burn::backend::Autodiff;
use burn::tensor::Tensor;
use hexa_moe::backends::Cpu;
use hexa_moe::parallel::BackwardEnd;
use hexa_ops::when_reached;

fn leaf() -> Tensor<Autodiff<Cpu>, 1> {
    Tensor::ones([3], &Default::default()).require_grad()
}

#[test]
fn the_end_of_a_backward_pass_does_not_wait_for_other_ranks() {
    let (slow_began, slow_has_begun) = channel();
    let (release, released) = channel::<()>();
    let released = std::sync::Mutex::new(released);
    let slow = std::thread::spawn(move || {
        let x = when_reached(leaf(), move || {
            slow_began.send(()).unwrap();
            let _ = released.lock().unwrap().recv();
        });
        drop(x.unwrap().sum().backward());
    });
    slow_has_begun.recv().unwrap();

    let (fast_ended, fast_has_ended) = channel();
    let start = Instant::now();
    let fast = std::thread::spawn(move || {
        let end = BackwardEnd::default();
        let x = when_reached(leaf(), move || fast_ended.send(()).unwrap()).unwrap();
        let x = end.mark(x).unwrap();
        drop(x.sum().backward());
        end.since(start)
    });
    fast_has_ended.recv().unwrap();
    let most = start.elapsed();
    // Time enough for a `backward` that does not wait to return.
    std::thread::sleep(Duration::from_millis(20));
    release.send(()).unwrap();
    let took = fast.join().unwrap();
    slow.join().unwrap();
    assert!(took <= most, "{took:?} of {most:?}");
}

#[test]
fn without_a_backward_pass_the_end_is_now() {
    let end = BackwardEnd::default();
    let start = Instant::now();
    let y = end.mark(leaf().inner()).unwrap().sum();
    assert_eq!(y.into_scalar(), 3.0);
    assert!(end.since(start) <= start.elapsed());
    drop(end.mark(leaf()).unwrap().sum().backward());
    let first = end.since(start);
    // What was asked for is forgotten: the next answer is later.
    assert!(end.since(start) > first);
}
