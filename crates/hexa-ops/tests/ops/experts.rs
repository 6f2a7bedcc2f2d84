//! ESMM, ESTMM, ESS and the combination over a token's choices.

use burn::tensor::{Tensor, TensorPrimitive};
use hexa_ops::testing::compare::{check_tensor, host};
use hexa_ops::testing::oracle::{Combine, Esmm, Ess, Estmm, Routing};
use hexa_ops::{
    EsmmOptions, ExpertIndex, ExpertKernels, RowOrder, TrainingBackend, backend_test, esmm, ess,
    estmm,
};
use proptest::prelude::*;

use crate::cases::{
    CASES, Layout, Numbers, Outcome, RoutingCase, check, expert_ids, fewer, laid_out, layout,
    most_tokens, routing_case, same_bits, tensor, width,
};

const ORDERS: [RowOrder; 3] = [RowOrder::Token, RowOrder::Slot, RowOrder::Expert];

/// A problem with two operands in some row orders.
#[derive(Debug, Clone)]
struct Case {
    routing: RoutingCase,
    orders: (RowOrder, RowOrder),
    widths: (usize, usize),
    transposed: bool,
    extra: bool,
    layouts: (Layout, Layout),
    seed: u64,
}

fn case(second: &'static [RowOrder]) -> impl Strategy<Value = Case> {
    (
        routing_case(most_tokens()),
        (
            prop::sample::select(&ORDERS[..]),
            prop::sample::select(second),
        ),
        (width(), width()),
        any::<bool>(),
        any::<bool>(),
        (layout(), layout()),
        any::<u64>(),
    )
        .prop_map(
            |(routing, orders, widths, transposed, extra, layouts, seed)| Case {
                routing,
                orders,
                widths,
                transposed,
                extra,
                layouts,
                seed,
            },
        )
}

fn grad_of<B: TrainingBackend, const D: usize>(
    leaf: &Tensor<B, D>,
    grads: &B::Gradients,
) -> Tensor<B::InnerBackend, D> {
    leaf.grad(grads).expect("tracked leaves have gradients")
}

/// Exactly zero where an expert has no slots.
fn check_idle_experts(name: &str, values: &[f64], routing: &Routing) -> Outcome {
    let per_expert = values.len() / routing.num_experts;
    for (expert, count) in routing.counts().into_iter().enumerate() {
        let block = &values[expert * per_expert..(expert + 1) * per_expert];
        if count == 0 {
            prop_assert!(
                block.iter().all(|&v| v == 0.0),
                "{name}: expert {expert} has no tokens"
            );
        } else {
            prop_assert!(
                block.iter().any(|&v| v != 0.0),
                "{name}: expert {expert} has {count} slots"
            );
        }
    }
    Ok(())
}

fn esmm_case<B: TrainingBackend>(case: &Case) -> Outcome {
    let routing = case.routing.routing();
    let (x_order, out_order) = case.orders;
    let (width_in, width_out) = case.widths;
    let mut numbers = Numbers::new(case.seed);
    let x_shape = [routing.num_rows(x_order), width_in];
    let w_shape = if case.transposed {
        [routing.num_experts, width_out, width_in]
    } else {
        [routing.num_experts, width_in, width_out]
    };
    let bias_shape = [routing.num_experts, width_out];
    let out_shape = [routing.num_slots(), width_out];
    let x = numbers.values(x_shape.iter().product());
    let w = numbers.values(w_shape.iter().product());
    let bias = case
        .extra
        .then(|| numbers.values(bias_shape.iter().product()));
    let grad = numbers.values(out_shape.iter().product());
    let oracle = Esmm {
        routing: &routing,
        x: &x,
        x_order,
        w: &w,
        transposed: case.transposed,
        bias: bias.as_deref(),
        out_order,
        width_in,
        width_out,
    };

    let index = ExpertIndex::<B>::new(expert_ids(&routing), routing.num_experts)?;
    let x_leaf = laid_out::<B, 2>(&x, x_shape, case.layouts.0).require_grad();
    let w_leaf = laid_out::<B, 3>(&w, w_shape, case.layouts.1).require_grad();
    let bias_leaf = bias
        .as_ref()
        .map(|b| laid_out::<B, 2>(b, bias_shape, case.layouts.1).require_grad());
    let options = EsmmOptions {
        x_order,
        transposed: case.transposed,
        out_order,
    };
    let y = esmm(
        x_leaf.clone(),
        w_leaf.clone(),
        bias_leaf.clone(),
        &index,
        options,
    )?;
    check_tensor("y", y.clone(), &oracle.forward(), out_shape)?;

    let grads = (y * laid_out(&grad, out_shape, case.layouts.0)).backward();
    let expected = oracle.backward(&grad);
    check_tensor("dx", grad_of(&x_leaf, &grads), &expected.x, x_shape)?;
    let dw = grad_of(&w_leaf, &grads);
    check_idle_experts("dw", &host(dw.clone()), &routing)?;
    check_tensor("dw", dw, &expected.w, w_shape)?;
    if let Some(leaf) = bias_leaf {
        let db = grad_of(&leaf, &grads);
        check_idle_experts("db", &host(db.clone()), &routing)?;
        check_tensor("db", db, &expected.bias, bias_shape)?;
    }
    Ok(())
}

fn esmm_equals_the_oracle<B: TrainingBackend>() {
    check(CASES, case(&ORDERS[1..]), |case| esmm_case::<B>(&case));
}

fn estmm_case<B: TrainingBackend>(case: &Case) -> Outcome {
    let routing = case.routing.routing();
    let (a_order, b_order) = case.orders;
    let (width_a, width_b) = case.widths;
    let mut numbers = Numbers::new(case.seed);
    let a_shape = [routing.num_rows(a_order), width_a];
    let b_shape = [routing.num_rows(b_order), width_b];
    let out_shape = [routing.num_experts, width_a, width_b];
    let a = numbers.values(a_shape.iter().product());
    let b = numbers.values(b_shape.iter().product());
    let grad = numbers.values(out_shape.iter().product());
    let oracle = Estmm {
        routing: &routing,
        a: &a,
        a_order,
        b: &b,
        b_order,
        width_a,
        width_b,
    };

    let index = ExpertIndex::<B>::new(expert_ids(&routing), routing.num_experts)?;
    let a_leaf = laid_out::<B, 2>(&a, a_shape, case.layouts.0).require_grad();
    let b_leaf = laid_out::<B, 2>(&b, b_shape, case.layouts.1).require_grad();
    let m = estmm(a_leaf.clone(), a_order, b_leaf.clone(), b_order, &index)?;
    check_idle_experts("m", &host(m.clone()), &routing)?;
    check_tensor("m", m.clone(), &oracle.forward(), out_shape)?;

    let grads = (m * laid_out(&grad, out_shape, case.layouts.1)).backward();
    let (da, db) = oracle.backward(&grad);
    check_tensor("da", grad_of(&a_leaf, &grads), &da, a_shape)?;
    check_tensor("db", grad_of(&b_leaf, &grads), &db, b_shape)?;
    Ok(())
}

fn estmm_equals_the_oracle<B: TrainingBackend>() {
    check(CASES, case(&ORDERS), |case| estmm_case::<B>(&case));
}

fn ess_case<B: TrainingBackend>(case: &Case) -> Outcome {
    let routing = case.routing.routing();
    let (order, width) = (case.orders.0, case.widths.0);
    let mut numbers = Numbers::new(case.seed);
    let x_shape = [routing.num_rows(order), width];
    let out_shape = [routing.num_experts, width];
    let x = numbers.values(x_shape.iter().product());
    let grad = numbers.values(out_shape.iter().product());
    let oracle = Ess {
        routing: &routing,
        x: &x,
        x_order: order,
        gates: None,
        width,
    };

    let index = ExpertIndex::<B>::new(expert_ids(&routing), routing.num_experts)?;
    let leaf = laid_out::<B, 2>(&x, x_shape, case.layouts.0).require_grad();
    let s = ess(leaf.clone(), order, &index)?;
    check_idle_experts("s", &host(s.clone()), &routing)?;
    check_tensor("s", s.clone(), &oracle.forward(), out_shape)?;
    let grads = (s * laid_out(&grad, out_shape, case.layouts.1)).backward();
    let dx = grad_of(&leaf, &grads);
    check_tensor("dx", dx, &oracle.backward(&grad), x_shape)?;
    Ok(())
}

fn ess_equals_the_oracle<B: TrainingBackend>() {
    check(CASES, case(&ORDERS), |case| ess_case::<B>(&case));
}

/// The kernels behind gate weighting, which the tensor-level functions only use inside the FFN.
fn weighted_sums_case<K: ExpertKernels>(case: &Case) -> Outcome {
    let routing = case.routing.routing();
    let (x_order, y_order) = case.orders;
    let width = case.widths.0;
    let mut numbers = Numbers::new(case.seed);
    let gates = case.extra.then(|| numbers.values(routing.num_slots()));
    let gates_shape = [routing.tokens, routing.top_k];
    let gates_tensor = || {
        gates
            .as_ref()
            .map(|g| primitive(laid_out::<K, 2>(g, gates_shape, case.layouts.1)))
    };
    let index = <K as ExpertKernels>::expert_index(
        expert_ids::<K>(&routing).into_primitive(),
        routing.num_experts,
    );

    let x_shape = [routing.num_rows(x_order), width];
    let x = numbers.values(x_shape.iter().product());
    let x_tensor = primitive(laid_out::<K, 2>(&x, x_shape, case.layouts.0));
    let sums = <K as ExpertKernels>::ess(x_tensor, x_order, gates_tensor(), index.clone());
    let expected = Ess {
        routing: &routing,
        x: &x,
        x_order,
        gates: gates.as_deref(),
        width,
    };
    let shape = [routing.num_experts, width];
    check_tensor("ess", float::<K>(sums), &expected.forward(), shape)?;

    let y_shape = [routing.num_slots(), width];
    let y = numbers.values(y_shape.iter().product());
    let y_tensor = primitive(laid_out::<K, 2>(&y, y_shape, case.layouts.0));
    let combined = K::combine(y_tensor, y_order, gates_tensor(), index);
    let expected = Combine {
        routing: &routing,
        y: &y,
        y_order,
        gates: gates.as_deref(),
        width,
    };
    let shape = [routing.tokens, width];
    check_tensor("combine", float::<K>(combined), &expected.forward(), shape)?;
    Ok(())
}

fn primitive<K: ExpertKernels>(tensor: Tensor<K, 2>) -> K::FloatTensorPrimitive {
    tensor.into_primitive().tensor()
}

fn float<K: ExpertKernels>(tensor: K::FloatTensorPrimitive) -> Tensor<K, 2> {
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}

fn weighted_sums_equal_the_oracle<K: ExpertKernels>() {
    check(CASES, case(&ORDERS[1..]), |case| {
        weighted_sums_case::<K>(&case)
    });
}

fn two_runs_have_the_same_bits<B: TrainingBackend>() {
    check(fewer(16), case(&ORDERS[1..]), |case| {
        let routing = case.routing.routing();
        let (a, b) = case.widths;
        let mut numbers = Numbers::new(case.seed);
        let index = ExpertIndex::<B>::new(expert_ids(&routing), routing.num_experts)?;
        let x = tensor::<B, 2>(&numbers.values(routing.tokens * a), [routing.tokens, a]);
        let w_shape = [routing.num_experts, a, b];
        let w = tensor::<B, 3>(&numbers.values(w_shape.iter().product()), w_shape);
        let run = || -> hexa_ops::Result<_> {
            let options = EsmmOptions::default();
            let y = esmm(x.clone(), w.clone(), None, &index, options)?;
            let m = estmm(
                x.clone(),
                RowOrder::Token,
                y.clone(),
                RowOrder::Slot,
                &index,
            )?;
            let s = ess(y.clone(), RowOrder::Slot, &index)?;
            Ok((y, m, s))
        };
        let (first, second) = (run()?, run()?);
        prop_assert!(same_bits(first.0, second.0), "esmm");
        prop_assert!(same_bits(first.1, second.1), "estmm");
        prop_assert!(same_bits(first.2, second.2), "ess");
        Ok(())
    });
}

backend_test!(esmm_matches, esmm_equals_the_oracle);
backend_test!(estmm_matches, estmm_equals_the_oracle);
backend_test!(ess_matches, ess_equals_the_oracle);
backend_test!(kernels weighted_sums_match, weighted_sums_equal_the_oracle);
backend_test!(operators_are_deterministic, two_runs_have_the_same_bits);
