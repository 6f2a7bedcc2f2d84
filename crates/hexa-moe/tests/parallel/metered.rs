//! A communicator that keeps time changes nothing, and counts everything.

use std::time::Duration;

use hexa_moe::parallel::ParallelContext;
use hexa_moe::parallel::comm::{Metered, Traffic, local};

#[test]
fn traffic_is_counted_by_kind_of_tensor() {
    let ranks = local::world(2).into_iter().map(|comm| {
        std::thread::spawn(move || {
            let (comm, meter) = Metered::new(comm);
            let context = ParallelContext::new(comm);
            let (rank, comm) = (context.rank(), context.comm());
            for layer in 0..3 {
                let own = vec![rank as f32; 1 + rank];
                let name = format!("layer {layer}: tokens");
                let all = comm.all_gather_v(&name, own, &[1, 2]).unwrap();
                assert_eq!(all, [0.0, 1.0, 1.0]);
            }
            let sum = comm.all_reduce("loss", vec![1.5]).unwrap();
            assert_eq!(sum, [3.0]);
            // Collectives that disagree are waited for, too.
            let error = comm.all_reduce("loss", vec![0.0; 1 + rank]).unwrap_err();
            assert_eq!(comm.failure(), Some(error));

            let waited = meter.waited();
            let totals = meter.take();
            let counts = |t: &Traffic| (t.collectives, t.elements);
            assert_eq!(counts(&totals["tokens"]), (3, 9));
            assert_eq!(counts(&totals["loss"]), (2, 1));
            // What the other has of three layers' tokens; the loss is of no layer.
            assert_eq!(totals["tokens"].received_by_layers, [6, 3][rank]);
            assert_eq!(totals["loss"].received_by_layers, 0);
            assert_eq!(totals.len(), 2);
            assert_eq!(waited, totals.values().map(|t| t.waited).sum());
            assert_eq!(meter.waited(), Duration::ZERO);
        })
    });
    for rank in ranks.collect::<Vec<_>>() {
        rank.join().unwrap();
    }
}
