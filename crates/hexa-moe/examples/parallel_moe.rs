//! A layer on two unequal ranks, here two threads with a CPU device each:
//!
//! ```text
//! cargo run --release -p hexa-moe --example parallel_moe
//! ```

use burn::backend::Autodiff;
use burn::optim::{AdamConfig, GradientsParams, Optimizer};
use burn::tensor::{Distribution, Tensor};
use hexa_moe::parallel::comm::local::{self, LocalCommunicator};
use hexa_moe::parallel::{
    BatchShare, Mode, ParallelContext, broadcast_parameters, exchange_gradients, parallelize,
    split_proportional,
};
use hexa_moe::{MoeConfig, MoeError, backends::Cpu};

type B = Autodiff<Cpu>;

/// How fast the devices are, relative to each other.
const SPEEDS: [f64; 2] = [3.0, 1.0];

fn train(comm: LocalCommunicator) -> Result<(), MoeError> {
    let device = Default::default();
    let context = ParallelContext::new(comm);
    let rank = context.rank();
    let config = MoeConfig::new(16, 64, 4).with_top_k(2);

    // Built by each rank in its own thread, equal by broadcast, then cut into slices. The faster
    // rank holds the wider one and has more tokens.
    let moe = broadcast_parameters(&context, config.init::<B>(&device)?)?;
    let widths = split_proportional(config.d_ff, &SPEEDS, 8)?;
    let mut moe = parallelize(moe, &context, 0, Mode::DataCentric, widths)?;
    let tokens = split_proportional(256, &SPEEDS, 1)?[rank];

    let x = Tensor::<B, 2>::random([tokens, 16], Distribution::Default, &device);
    let target = (x.clone() * 3.0).sin();
    let share = BatchShare::exchange(&context, tokens)?;
    let mut optimizer = AdamConfig::new().init();
    for step in 0..50 {
        let out = moe.try_forward(x.clone())?;
        let error = out.output - target.clone();
        let loss = share.weigh((error.clone() * error).mean()) + out.aux_loss;
        if step % 10 == 0 && rank == 0 {
            println!("step {step}: {:?}", out.load.read()?.tokens_per_expert);
        }
        let mut grads = GradientsParams::from_grads(loss.backward(), &moe);
        exchange_gradients(&context, &moe, &mut grads)?;
        moe = optimizer.step(0.01, moe, grads);
    }
    Ok(())
}

fn main() -> Result<(), MoeError> {
    std::thread::scope(|scope| {
        let ranks: Vec<_> = local::world(SPEEDS.len())
            .into_iter()
            .map(|comm| scope.spawn(|| train(comm)))
            .collect();
        ranks
            .into_iter()
            .try_for_each(|rank| rank.join().expect("a rank panicked"))
    })
}
